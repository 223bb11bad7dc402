"""Methods whose interface may change in any release."""

import os
import warnings

from ..import_utils import TRLExperimentalWarning

if not os.environ.get("TRL_EXPERIMENTAL_SILENCE"):
    warnings.warn(
        "`trl.experimental` may change, or lose a method, in any release. Pin the version of trl that you use. Set "
        "TRL_EXPERIMENTAL_SILENCE=1 to silence this warning.",
        TRLExperimentalWarning,
        stacklevel=2,
    )
