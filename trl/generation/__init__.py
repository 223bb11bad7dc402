"""Generation with vLLM under the path users know; it lives in `trl.rollouts`."""
