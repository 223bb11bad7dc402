"""Settings of policy losses: which are refused, which are warned of, and how a config's fields become them."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import warnings

import pytest

from trl.losses.policy import policy_unit
from trl.losses.policy_options import PolicyLossOptions

NAN = math.nan


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "drgrpo"}, "Did you mean 'dr_grpo'"),
        ({"importance_sampling_level": "sequences"}, "Did you mean 'sequence'"),
        ({"vllm_importance_sampling_mode": "token_masked"}, "Did you mean 'token_mask'"),
        ({"epsilon": -0.1}, "`epsilon` is a number of at least 0"),
        ({"epsilon_high": NAN}, "`epsilon_high`"),
        ({"delta": 0}, "`delta` is a number above 0, or None"),
        ({"beta": -1}, "`beta`"),
        ({"beta": "0.1"}, "Found '0.1'"),
        ({"top_entropy_quantile": 1.2}, "`top_entropy_quantile` is a number from 0 to 1"),
        ({"off_policy_mask_threshold": math.inf}, "`off_policy_mask_threshold`"),
        ({"sapo_temperature_neg": 0.0}, "`sapo_temperature_neg`"),
        ({"vespo_k_pos": -1.0}, "`vespo_k_pos`"),
        ({"entropy_coef_delta": -1.0}, "`entropy_coef_delta`"),
        ({"use_adaptive_entropy": True, "entropy_coef_min": 2.0}, "`entropy_coef_min=2.0` is above"),
        ({"loss_type": "dr_grpo", "max_completion_length": None}, "`max_completion_length`, which is None"),
        ({"vllm_importance_sampling_clip_min": 3.0}, "`vllm_importance_sampling_clip_min=3.0` is not below"),
        (
            {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": None},
            "Set one, for instance clip_max",
        ),
        ({"loss_type": "vespo", "use_vllm": True}, "use 'token_truncate' or 'token_mask'"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PolicyLossOptions(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "luspo"}, "set `importance_sampling_level='sequence'`"),
        ({"loss_type": "vespo", "importance_sampling_level": "sequence"}, "leave `importance_sampling_level='token'`"),
        *(
            ({"loss_type": name, "importance_sampling_level": "sequence"}, "GSPO is `loss_type='grpo'`")
            for name in ("bnpo", "dr_grpo", "dapo")
        ),
        ({"loss_type": "cispo", "importance_sampling_level": "sequence", "epsilon_high": 5.0}, "GSPO"),
        ({"loss_type": "cispo"}, "largest weight of a token"),
    ],
)
def test_combinations_that_are_warned_of(settings, message):
    with pytest.warns(UserWarning, match=re.escape(message)):
        PolicyLossOptions(**settings)


def test_usual_settings_are_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("grpo", "bnpo", "dr_grpo", "dapo", "sapo", "vespo"):
            PolicyLossOptions(loss_type=name)
        PolicyLossOptions(loss_type="cispo", epsilon_high=5.0)
        PolicyLossOptions(loss_type="luspo", importance_sampling_level="sequence")
        PolicyLossOptions(loss_type="grpo", importance_sampling_level="sequence")
        PolicyLossOptions(loss_type="vespo", use_vllm=True, vllm_importance_sampling_mode="token_mask")
        PolicyLossOptions(loss_type="vespo", use_vllm=True, vllm_importance_sampling_correction=False)


def test_options_need_no_torch():
    """So that a command line can check them at once."""
    code = "import sys; from trl.losses import policy_options; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


class Config:
    """Like a training config: more fields than the options, not all of theirs."""

    loss_type = "grpo"
    importance_sampling_level = "sequence"
    epsilon = 0.3
    epsilon_high = None
    learning_rate = 1.0


def test_options_of_a_config():
    options = PolicyLossOptions.of(Config, epsilon=0.1)
    assert (options.loss_type, options.importance_sampling_level, options.epsilon) == ("grpo", "sequence", 0.1)
    assert options.upper_epsilon == 0.1
    rloo = PolicyLossOptions.of_rloo(Config)
    assert (rloo.importance_sampling_level, rloo.epsilon, rloo.beta) == ("trajectory", 0.3, 0)
    assert policy_unit(rloo) == "rows"

    class Trajectory(Config):
        importance_sampling_level = "trajectory"

    with pytest.raises(ValueError, match="importance_sampling_level"):
        PolicyLossOptions.of(Trajectory)
