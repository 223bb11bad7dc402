"""Profiling under the path users know; it lives in `trl.reports.profiling`."""

from ..reports.profiling import ProfilingContext, profiling_context, profiling_decorator

__all__ = ["ProfilingContext", "profiling_context", "profiling_decorator"]
