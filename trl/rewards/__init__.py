"""Reward functions, and the suite that runs them."""

from .._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "trl.rewards.accuracy_rewards": ["accuracy_reward", "get_cosine_scaled_reward", "reasoning_accuracy_reward"],
        "trl.rewards.code_execution": ["code_execution_reward", "get_code_execution_reward"],
        "trl.rewards.format_rewards": ["think_format_reward"],
        "trl.rewards.other_rewards": ["get_repetition_penalty_reward", "get_soft_overlong_punishment"],
        "trl.rewards.suite": ["RewardError", "RewardSuite", "RewardTable", "RewardValueError"],
    },
)
