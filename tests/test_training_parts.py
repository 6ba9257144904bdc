"""Heads, schedules, EMA, clipping and LARS against values worked out by hand or in numpy."""

import copy
import math
import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

import lowdino
from lowdino import budget, distributed, ema, optim, schedules
from lowdino.heads import DINOHead, MultiViewNetwork


def test_head_is_mlp_unit_length_unit_prototypes():
    head = DINOHead(6, 9, hidden_dim=5, bottleneck_dim=4).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    w = {k: v.detach().numpy() for k, v in head.named_parameters()}
    z = x.numpy()
    gelu = np.vectorize(lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))))
    for layer in (0, 2, 4):
        z = z @ w[f"mlp.{layer}.weight"].T + w[f"mlp.{layer}.bias"]
        if layer < 4:
            z = gelu(z)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    prototypes = w["last_layer.weight"]
    prototypes = prototypes / np.linalg.norm(prototypes, axis=1, keepdims=True)
    np.testing.assert_allclose(head(x).detach().numpy(), z @ prototypes.T, rtol=1e-9)
    assert "last_layer.gain" not in w


def test_head_options():
    head = DINOHead(6, 9, use_bn=True, norm_last_layer=False, hidden_dim=5, bottleneck_dim=4)
    assert sum(isinstance(m, nn.BatchNorm1d) for m in head.modules()) == 2
    gain = 1 + torch.rand(9, 1)  # of each prototype, in the shape of DINO's weight_g
    with torch.no_grad():
        head.last_layer.gain.copy_(gain)
    x = torch.randn(8, 6)
    free = head(x)
    head.last_layer.gain = None
    torch.testing.assert_close(free, gain.T * head(x))
    copy.deepcopy(head)(x)  # which the hooks of torch's weight_norm refuse


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_unit_vectors_and_logits_are_float32_under_autocast(norm_last_layer):
    head = DINOHead(6, 9, norm_last_layer=norm_last_layer, hidden_dim=5, bottleneck_dim=4)
    x = torch.randn(8, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert head.mlp(x).dtype == torch.bfloat16
        z, logits = head.embed(x), head(x)
        raw = head.mlp(x)
    assert z.dtype == logits.dtype == torch.float32
    # Not bfloat16 in between either: from the output of the MLP on, float32 throughout.
    torch.testing.assert_close(z, nn.functional.normalize(raw.float(), dim=-1))
    torch.testing.assert_close(logits, head.last_layer(z))
    logits.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in head.parameters())


def test_network_runs_one_forward_a_resolution():
    class Counter(nn.Module):
        calls = 0

        def forward(self, x):
            Counter.calls += 1
            return x.mean(dim=(2, 3))

    head = DINOHead(3, 2, hidden_dim=4, bottleneck_dim=5)
    network = MultiViewNetwork(Counter(), head)
    views = [torch.randn(4, 3, s, s) for s in (8, 8, 6, 6, 6)]
    features, embeddings, logits = network(views)
    assert Counter.calls == 2
    assert features.shape == (20, 3) and embeddings.shape == (20, 5) and logits.shape == (20, 2)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(20))
    torch.testing.assert_close(logits, head(features))
    torch.testing.assert_close(features, torch.cat([v.mean(dim=(2, 3)) for v in views]))


def test_cosine_is_the_originals():
    """DINO's: linspace in the warm-up, then end + (start - end)(1 + cos(pi i / n)) / 2, n steps."""
    ramp = np.linspace(0, 0.5, 4)
    n = 6
    fall = 0.1 + 0.2 * (1 + np.cos(np.pi * np.arange(n) / n))
    ours = [schedules.cosine(s, 10, 0.5, 0.1, warmup_steps=4) for s in range(10)]
    np.testing.assert_allclose(ours, np.concatenate([ramp, fall]), atol=1e-12)
    assert schedules.cosine(0, 4, 0.996, 1.0) == 0.996
    assert schedules.cosine(2, 4, 0.996, 1.0) == pytest.approx(0.998)
    assert schedules.cosine(0, 4, 1.0, 0.0, warmup_steps=4) == 0.0  # nothing but warm-up
    assert schedules.cosine(3, 4, 1.0, 0.0, warmup_steps=4) == 1.0


def test_linear():
    assert [schedules.linear(s, 4, 0.04, 0.08) for s in (0, 1, 4, 9)] == pytest.approx(
        [0.04, 0.05, 0.08, 0.08]
    )
    assert schedules.linear(0, 0, 0.04, 0.07) == 0.07


def test_teacher_follows_by_name_and_keeps_its_own_buffers():
    student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    teacher = ema.make_teacher(student)
    pairs = ema.paired_parameters(teacher, student)
    assert not any(p.requires_grad for p in teacher.parameters())
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1.0)
        student[1].running_mean.fill_(7.0)
    before = {k: v.clone() for k, v in teacher.named_parameters()}
    ema.update(*pairs, 0.9)
    ema.update(*pairs, 0.9)
    for name, p in teacher.named_parameters():
        torch.testing.assert_close(p, before[name] + 1 - 0.9**2)
    assert teacher[1].running_mean.abs().sum() == 0


def test_teacher_that_is_the_student_is_refused():
    student = nn.Linear(3, 4)
    with pytest.raises(ValueError, match="share .*'weight'.*must be a copy"):
        ema.paired_parameters(student, student)
    with pytest.raises(ValueError, match="different parameters: .*'0.bias'"):
        ema.paired_parameters(nn.Sequential(nn.Linear(3, 4)), student)


def test_clipping_is_by_parameter():
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in (3, (2, 2), 1)]
    parameters[0].grad = torch.tensor([3.0, 0.0, 4.0])
    parameters[1].grad = torch.full((2, 2), 0.1)
    optim.clip_gradients_by_parameter(parameters, 2.0)
    torch.testing.assert_close(parameters[0].grad, torch.tensor([1.2, 0.0, 1.6]))
    torch.testing.assert_close(parameters[1].grad, torch.full((2, 2), 0.1))
    assert parameters[2].grad is None


def test_groups_are_of_weights_and_of_biases_and_norms():
    head = DINOHead(4, 5, norm_last_layer=False)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), head)
    decays, spared = optim.parameter_groups(model)
    assert decays["decays"] and not spared["decays"] and spared["weight_decay"] == 0
    weights = [model[0], head.mlp[0], head.mlp[2], head.mlp[4], head.last_layer]
    expected = [layer.weight for layer in weights] + [head.last_layer.gain]
    assert {id(p) for p in decays["params"]} == {id(p) for p in expected}
    assert len(decays["params"]) + len(spared["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("arch", ["resnet5m", "mobilevit_xxs", "vit_tiny"])
def test_a_step_decays_weights_and_gains_but_no_bias_and_no_norm(arch):
    """AdamW without a gradient: w <- (1 - lr * weight_decay) * w, so exactly what decays moves."""
    backbone = lowdino.build_backbone(arch)
    head = DINOHead(
        backbone.embed_dim, 5, use_bn=True, norm_last_layer=False, hidden_dim=6, bottleneck_dim=4
    )
    model = nn.ModuleDict({"backbone": backbone, "head": head})
    spared = {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
        if name == "bias" or isinstance(module, (nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d))
    }
    before = {}
    for name, p in model.named_parameters():
        p.data.uniform_(1, 2)  # nothing at zero, where decay would not show
        p.grad = torch.zeros_like(p)
        before[name] = p.detach().clone()
    torch.optim.AdamW(optim.parameter_groups(model), lr=0.1, weight_decay=0.5).step()
    assert "head.last_layer.gain" in before.keys() - spared and "head.mlp.1.weight" in spared
    for name, p in model.named_parameters():
        factor = 1.0 if name in spared else 0.95
        torch.testing.assert_close(p, factor * before[name], rtol=1e-6, atol=0, msg=name)


def depths(backbone):
    """Exponent of the layer decay of each parameter of a backbone, by name; the head's is 0."""
    head = nn.Linear(2, 3)
    groups = optim.layerwise_groups(backbone, head, 0.5)
    scales = {id(p): group["scale"] for group in groups for p in group["params"]}
    parameters = [*backbone.parameters(), *head.parameters()]
    assert len(scales) == len(parameters) == sum(len(g["params"]) for g in groups)
    assert scales[id(head.weight)] == scales[id(head.bias)] == 1
    return {name: -math.log2(scales[id(p)]) for name, p in backbone.named_parameters()}


def test_layer_decay_of_a_vit_is_beits():
    expected = {"norm": 0} | {f"blocks.{i}": 12 - i for i in range(12)}
    expected |= {"cls_token": 13, "pos_embed": 13, "register_tokens": 13, "patch_embed": 13}
    found = {}
    for name, depth in depths(lowdino.build_backbone("vit_tiny", registers=2)).items():
        block = ".".join(name.split(".")[: 2 if name.startswith("blocks.") else 1])
        assert found.setdefault(block, depth) == depth, name
    assert found == expected


@pytest.mark.parametrize(
    "arch, expected",
    [
        (
            "resnet5m",
            "layer3.0 layer2.5 layer2.4 layer2.3 layer2.2 layer2.1 layer2.0 "
            "layer1.2 layer1.1 layer1.0 bn1 conv1",
        ),
        ("mobilevit_xxs", "final_conv stages.4 stages.3 stages.2 stages.1 stages.0 stem"),
    ],
)
def test_layer_decay_of_a_convnet_is_by_block(arch, expected):
    """`expected` has the blocks from the head down, at depths 1, 2, 3, ..."""
    blocks = expected.split()
    found = depths(lowdino.build_backbone(arch))
    for name, depth in found.items():
        assert depth >= 1 and name.startswith(blocks[int(depth) - 1] + "."), name
    assert set(found.values()) == set(range(1, len(blocks) + 1))


def test_lars_by_hand():
    w, b = nn.Parameter(torch.tensor([[3.0, 4.0]])), nn.Parameter(torch.tensor([1.0]))
    lars = optim.LARS([w, b], lr=0.1, weight_decay=0.5, momentum=0.9, trust=0.01)
    wn, bn, vw, vb = np.array([[3.0, 4.0]]), np.array([1.0]), 0, 0
    for _ in range(3):
        w.grad, b.grad = torch.tensor([[1.0, -2.0]]), torch.tensor([0.3])
        lars.step()
        d = np.array([[1.0, -2.0]]) + 0.5 * wn
        d = d * 0.01 * np.linalg.norm(wn) / np.linalg.norm(d)
        vw, vb = 0.9 * vw + d, 0.9 * vb + np.array([0.3])
        wn, bn = wn - 0.1 * vw, bn - 0.1 * vb
        np.testing.assert_allclose(w.detach().numpy(), wn, rtol=1e-6)
        np.testing.assert_allclose(b.detach().numpy(), bn, rtol=1e-6)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's allocator")
@pytest.mark.parametrize("keeps", [False, True])
def test_memory_that_a_step_freed_comes_back_without_page_faults(keeps):
    """16 times 64 MiB are taken, written and freed, in a process of its own: the setting stays."""
    code = f"""
import resource, torch
from lowdino import distributed
if {keeps}:
    distributed.keep_freed_memory()
for _ in range(4):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(16):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = int(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
        ).stdout
    )
    assert faults < 300 if keeps else faults > 300  # of 512 huge pages, or 262,144 others


@pytest.fixture
def started_as(monkeypatch):
    """started_as(variables): an environment with these of torchrun's and srun's variables only."""

    def start(environment):
        for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_"))]:
            monkeypatch.delenv(name)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return start


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1"}, True),
        ({"LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}, False),
        ({"SLURM_STEP_NUM_NODES": "1", "MASTER_ADDR": "first"}, True),
        ({"SLURM_STEP_NUM_NODES": "2", "MASTER_ADDR": "first"}, False),
        ({"MASTER_ADDR": "127.0.0.1"}, True),
        ({"MASTER_ADDR": "10.0.0.1"}, False),  # started by hand, on hosts that are not known
    ],
)
def test_ranks_are_on_one_machine_where_something_says_so(environment, expected, started_as):
    started_as(environment)
    assert distributed.on_one_machine(2) == expected


def test_a_rank_without_a_gpu_is_refused_inside_a_slurm_job_too(started_as, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    # As torchrun sets them for its second rank, in the script of a job.
    started_as(
        {
            "RANK": "1",
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "1",
            "SLURM_LOCALID": "0",
            "TORCHELASTIC_RUN_ID": "none",
        }
    )
    with pytest.raises(ValueError, match="local rank 1 has no GPU of its own: 1 visible"):
        distributed.start("cuda")


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, (0, 1, 0)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (5, 8, 1)),
        (
            {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"},
            (3, 4, 1),
        ),  # srun
        (
            {
                "SLURM_PROCID": "0",
                "SLURM_NTASKS": "4",
                "SLURM_STEP_NUM_TASKS": "1",
                "SLURM_LOCALID": "0",
            },
            (0, 1, 0),
        ),  # python in an allocation
        (
            {
                "RANK": "1",
                "WORLD_SIZE": "2",
                "LOCAL_RANK": "1",
                "SLURM_PROCID": "0",
                "SLURM_STEP_NUM_TASKS": "4",
                "SLURM_LOCALID": "0",
            },
            (1, 2, 1),
        ),
    ],
)
def test_ranks_come_from_torchrun_or_srun(environment, expected, started_as):
    started_as(environment)
    assert distributed.rank_from_environment() == expected


@pytest.mark.parametrize(
    "device, capability, expected",
    [
        ("cuda:1", (7, 5), "fp16"),
        ("cuda:1", (8, 0), "bf16"),
        ("cuda:1", (12, 0), "bf16"),
        ("cpu", None, "auto"),
        ("mps", None, "none"),
    ],
)
def test_autocast_is_what_the_device_has_cores_for(device, capability, expected, monkeypatch):
    asked = []
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda d: asked.append(d) or capability
    )
    assert budget.amp_of("auto", torch.device(device)) == expected
    assert asked == [torch.device(device)] * (capability is not None)
