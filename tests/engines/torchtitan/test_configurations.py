"""Configurations of torchtitan: what `balanced` makes of them, its command line, and what is refused or warned of."""

from __future__ import annotations

import json
import sys
import types
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from equipoise import Balancer, ConfigError, ExpertBias, StateError, ZLoss

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("default")]  # its imports warn of much


@pytest.fixture(scope="module")
def tiny():
    """(the recorder's module, a configuration of it): nothing is trained here."""
    from engines.torchtitan import record_titan

    case = record_titan.Case(name="none", own=1e-3)
    return record_titan, lambda: record_titan.configuration(case, Path("unused"))


def small(config):
    """Routers as torchtitan builds them, on a CPU."""
    config.model_spec.model.update_from_config(config=config)
    return config.model_spec.model.build()


def test_its_command_line_takes_it(monkeypatch):
    from torchtitan.config import ConfigManager
    from torchtitan.models.qwen3.config_registry import qwen3_moe_debug

    from equipoise.adapters.torchtitan import BalancedTrainer, balanced

    runs = types.ModuleType("runs_of_mine")
    runs.balance = lambda: balanced(qwen3_moe_debug(), ["global+micro", ZLoss(1e-4)], layers=True)
    monkeypatch.setitem(sys.modules, "runs_of_mine", runs)
    flags = ["--module", "runs_of_mine", "--config", "balance", "--training.steps", "7"]
    config = ConfigManager().parse_args(flags)
    assert config._owner is BalancedTrainer
    assert config.training.steps == 7
    assert [type(one).__name__ for one in config.equipoise.policies_of(7)] == ["AuxLoss", "AuxLoss", "ZLoss"]
    assert json.loads(json.dumps(config.to_dict()))["equipoise"]["layers"] is True


class TestRefused:
    @pytest.mark.parametrize(
        ("part", "name", "value"),
        [
            ("training", "disable_cuda_graphs", False),
            ("parallelism", "pipeline_parallel_degree", 2),
            ("parallelism", "context_parallel_degree", 2),
            ("parallelism", "tensor_parallel_degree", 2),
            ("parallelism", "spmd_backend", "full_dtensor"),
            ("comm", "mode", "fake_backend"),
            ("debug", "moe_force_load_balance", True),
            ("debug", "spmd_typechecking", True),
        ],
    )
    def test_by_its_name(self, tiny, part, name, value):
        from equipoise.adapters.torchtitan_limits import check_limits

        config = tiny[1]()
        check_limits(config)
        setattr(getattr(config, part), name, value)
        with pytest.raises(ConfigError, match=f"{part}.{name} = {value!r}"):
            check_limits(config)

    def test_a_configuration_that_is_balanced_already(self, tiny):
        from equipoise.adapters.torchtitan import balanced

        with pytest.raises(ConfigError, match="pass all policies to one"):
            balanced(balanced(tiny[1](), ["global"]), ["z"])

    def test_one_of_another_trainer(self):
        from torchtitan.trainer import Trainer

        from equipoise.adapters.torchtitan import balanced

        class ImageTrainer(Trainer):
            @dataclass(kw_only=True, slots=True)
            class Config(Trainer.Config):
                pass

        with pytest.raises(ConfigError, match=r"ImageTrainer\.Config"):
            balanced(ImageTrainer.Config(), [])

    def test_its_own_balancing_that_cannot_be_taken_out(self, tiny):
        from equipoise.adapters.torchtitan_limits import own_balancing_off

        def moves_it_too(optimizers, parts, dims): ...

        config = tiny[1]()
        policies = [ZLoss()]
        assert own_balancing_off(replace(config), []) == "on, as it was (load_balance_coeff 0.001)"
        config.model_spec.post_optimizer_build_fn = moves_it_too
        with pytest.raises(ConfigError, match="moves_it_too, which may move the routers' bias too"):
            own_balancing_off(config, policies)

    def test_its_own_balancing_is_taken_out_of_this_configuration_alone(self, tiny):
        from equipoise.adapters.torchtitan_limits import own_balancing_off

        config = tiny[1]()
        mine = replace(config)
        assert own_balancing_off(mine, [ZLoss()]).startswith("off (its bias was moved with load_balance_coeff 0.001")
        assert mine.model_spec.post_optimizer_build_fn is None
        assert config.model_spec.post_optimizer_build_fn is not None


class TestRouters:
    def test_one_that_is_not_known(self, tiny):
        from torchtitan.models.common.moe import TokenChoiceTopKRouter

        from equipoise.adapters.torchtitan_routers import hook_routers

        class HashRouter(TokenChoiceTopKRouter):
            def forward(self, x_BLD, expert_bias_E=None):
                return super().forward(x_BLD, expert_bias_E)

        model = small(tiny[1]())
        model.layers["1"].moe.router.__class__ = HashRouter
        with pytest.raises(ConfigError, match=r"layers.1.moe.router: a .*HashRouter with a forward of its own"):
            hook_routers([model], takes_bias=False, documents=False)
        assert not any("equipoise" in name for name, _ in model.named_modules()), "nothing was changed"

    def test_one_beside_its_own(self, tiny):
        from equipoise.adapters.torchtitan_routers import hook_routers

        class TinyRouter(torch.nn.Linear): ...

        model = small(tiny[1]())
        model.layers["0"].extra = TinyRouter(4, 4)
        with pytest.raises(ConfigError, match=r"layers.0.extra: a .*TinyRouter"):
            hook_routers([model], takes_bias=False, documents=False)

    def test_a_bias_where_torchtitan_makes_none(self, tiny):
        from equipoise.adapters.torchtitan_routers import hook_routers

        model = tiny[0].configuration(tiny[0].Case(name="none"), Path("unused")).model_spec.model.build()
        hook_routers([model], takes_bias=True, documents=False)
        with pytest.raises(ConfigError, match=r"give its MoE\.Config a load_balance_coeff"):
            Balancer(model, [ExpertBias()])

    def test_two_balancers(self, tiny):
        from equipoise.adapters.torchtitan_routers import hook_routers

        model = small(tiny[1]())
        hook_routers([model], takes_bias=False, documents=False)
        Balancer(model, [ZLoss()])
        with pytest.raises(StateError, match="one balancer per model"):
            Balancer(model, [ZLoss()])

    @pytest.mark.parametrize("name", ["deepseek_v3.deepseek_v3_debugmodel", "gpt_oss.gpt_oss_debugmodel"])
    def test_those_of_its_other_models_are_found(self, name):
        import importlib

        from equipoise.adapters.torchtitan_routers import moe_layers

        family, function = name.split(".")
        registry = importlib.import_module(f"torchtitan.models.{family}.config_registry")
        with torch.device("meta"):
            model = small(getattr(registry, function)())
        assert list(moe_layers([model]))


class TestWarned:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda config: setattr(config.training, "enable_cpu_offload", True), "training.enable_cpu_offload"),
            (lambda config: setattr(config.training, "dtype", "bfloat16"), "training.dtype = 'bfloat16'"),
            (lambda config: setattr(config.parallelism, "spmd_backend", "spmd_types"), "'spmd_types' on several ranks"),
            (lambda config: setattr(config.override, "imports", ["my.rope"]), r"override.imports = \['my.rope'\]"),
        ],
    )
    def test_by_its_name(self, tiny, change, words):
        from equipoise.adapters.torchtitan_limits import warn_of_untried

        config = tiny[1]()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warn_of_untried(config, 2)
        change(config)
        with pytest.warns(UserWarning, match=f"never ran in torchtitan with .*{words}"):
            warn_of_untried(config, 2)

    def test_a_dispatcher(self):
        from torchtitan.models.qwen3.config_registry import qwen3_moe_deepep

        from equipoise.adapters.torchtitan_limits import warn_of_untried

        with pytest.warns(UserWarning, match="the dispatcher DeepEPTokenDispatcher"):
            warn_of_untried(qwen3_moe_deepep(), 1)

    def test_a_quantised_layer(self, tiny):
        """torchtitan's own classes of such layers need torchao."""
        from torchtitan.models.common.linear import Linear

        from equipoise.adapters.torchtitan_limits import warn_of_untried

        class NVFP4Linear(Linear):
            @dataclass(kw_only=True, slots=True)
            class Config(Linear.Config):
                pass

        config = tiny[1]()
        config.model_spec.model.lm_head = NVFP4Linear.Config(in_features=32, out_features=128)
        with pytest.warns(UserWarning, match="never ran in torchtitan with NVFP4Linear"):
            warn_of_untried(config, 1)
