"""One launchable file per method, and what the scripts share."""

from .._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "trl.scripts.utils": [
            "DatasetMixtureConfig",
            "ScriptArguments",
            "TrlParser",
            "get_dataset",
            "init_zero_verbose",
        ],
    },
)
