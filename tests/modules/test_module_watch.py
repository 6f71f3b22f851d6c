"""Notice of changed modules, and of whoever looks at their calls."""

import copy

import pytest
import torch
from torch import nn

from hf_efficient.modules.module_watch import ModuleWatch


def make_module():
    return nn.Sequential(nn.Linear(5, 3), nn.Sequential(nn.LayerNorm(3), nn.BatchNorm1d(3))).eval()


def replace_parameter(module):
    module[0].weight = nn.Parameter(torch.zeros(3, 5))


def remove_bias(module):
    module[0].bias = None


def replace_buffer(module):
    module[1][1].running_mean = torch.ones(3)


def replace_module(module):
    module[1][0] = nn.LayerNorm(3).eval()


def change_epsilon(module):
    module[1][0].eps = 0.5


def double_values(module):
    for parameter in module.parameters():
        parameter.data = 2 * parameter.data


@pytest.mark.parametrize("change", [replace_parameter, remove_bias, replace_buffer, replace_module, change_epsilon])
def test_other_objects_are_a_change(change):
    module = make_module()
    watch = ModuleWatch.below(module)
    assert not watch.has_changed()
    change(module)
    assert watch.has_changed()
    assert not ModuleWatch.below(module).has_changed()


def test_other_values_are_none():
    module = make_module()
    watch = ModuleWatch.below(module)
    double_values(module)
    assert not watch.has_changed()
    assert not watch.is_looked_at()


def hook(module):
    return module.register_forward_hook(lambda *args: None).remove


def hook_before(module):
    return module.register_forward_pre_hook(lambda *args: None).remove


def replace_forward(module):
    module.forward = lambda x: x
    return lambda: module.__dict__.pop("forward")


def train(module):
    module.training = True
    return module.eval


@pytest.mark.parametrize("look", [hook, hook_before, replace_forward, train])
@pytest.mark.parametrize("place", ["0", "1", "1.1"])
def test_whoever_looks_at_a_call_is_seen(look, place):
    module = make_module()
    watch = ModuleWatch.below(module)
    leave = look(module.get_submodule(place))
    assert watch.is_looked_at()
    assert not watch.has_changed()
    leave()
    assert not watch.is_looked_at()


def test_calls_of_the_module_itself_are_watched_where_several_are_joined():
    modules = [make_module(), make_module()]
    each = [ModuleWatch.below(module) for module in modules]
    joined = ModuleWatch.joined(each, modules)
    leave = hook(modules[1])
    assert joined.is_looked_at()
    assert not each[1].is_looked_at()
    leave()
    assert not joined.is_looked_at()
    replace_parameter(modules[0])
    assert joined.has_changed()
    assert not each[1].has_changed()


def test_a_copy_is_not_watched():
    module = make_module()
    watch, twin = ModuleWatch.below(module), copy.deepcopy(module)
    hook(twin[0])
    replace_parameter(twin)
    assert not watch.has_changed()
    assert not watch.is_looked_at()
