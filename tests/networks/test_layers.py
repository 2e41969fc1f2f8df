"""The fast layers against PyTorch's: value, gradient, double gradient and statistics."""

import copy

import pytest
import torch
import torch.nn.functional as F
from reference import RectifyingNorm
from torch import nn
from torch.autograd import grad, gradcheck, gradgradcheck

from engine.networks import compiling, convolution, fast_batch_norm

LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format
GEOMETRIES = [
    dict(padding=1),
    dict(stride=2, padding=1),
    dict(stride=(1, 2)),
    dict(padding=(2, 0)),
    dict(dilation=2, padding=2),
    dict(groups=2),
]
FALLBACKS = [dict(padding_mode="reflect", padding=1), dict(padding="same")]


@pytest.fixture(autouse=True)
def _eager_and_seeded():
    torch.manual_seed(0)
    yield
    compiling.set_compile(False)


def plain_copy(net: nn.Module) -> nn.Module:
    """Return a copy of net with PyTorch's own modules in place of fused ones."""
    net = copy.deepcopy(net)
    for name, module in list(net.named_modules()):
        if isinstance(module, convolution.Conv2d):
            module.__class__ = nn.Conv2d
        elif isinstance(module, fast_batch_norm.BatchNorm2d):
            module.__class__ = nn.BatchNorm2d
            net.set_submodule(name, nn.Sequential(module, nn.ReLU()))
    return net


class Blocks(nn.Module):
    """Two convolution blocks and a linear layer; the second convolution sees an activation."""

    def __init__(self, stride=2):
        super().__init__()
        self.conv1 = convolution.Conv2d(3, 8, 3, padding=1, bias=False)
        self.conv2 = convolution.Conv2d(8, 16, 3, stride, padding=1, bias=False)
        self.norm1, self.norm2 = RectifyingNorm(8), RectifyingNorm(16)
        self.last = nn.Linear(16, 5)
        for norm in (self.norm1, self.norm2):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)

    def forward(self, x):
        a = self.norm1(self.conv1(x))
        b = self.norm2(self.conv2(a))
        return self.last(b.mean((2, 3), dtype=self.last.weight.dtype)), [a, b]


def penalised(net, x, labels):
    """Return logits, the loss's gradients and those of the squared norms of all gradients."""
    params = list(net.parameters())
    logits, activations = net(x)
    g = grad(F.cross_entropy(logits, labels), params + activations, create_graph=True)
    penalty = sum(
        t.float().square().sum() if t.dtype != torch.float64 else t.square().sum() for t in g
    )
    return logits.detach(), [t.detach() for t in g], grad(penalty, params)


def assert_same(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        a, b = a.detach(), b.detach()
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


# --- derivatives ------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_conv_derivatives(geometry, bias):
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 4 // geometry.get("groups", 1), 3, 3, dtype=torch.float64)
    b = (torch.randn(4, dtype=torch.float64, requires_grad=True),) if bias else ()

    def conv(x, w, *b):
        return convolution.conv2d(x, w, *(b or (None,)), **geometry)

    args = (x, w.requires_grad_(), *b)
    torch.testing.assert_close(conv(*args), F.conv2d(*args[:2], *b, **geometry))
    assert gradcheck(conv, args, fast_mode=True) and gradgradcheck(conv, args, fast_mode=True)


@pytest.mark.parametrize("layout", [CONTIGUOUS, LAST])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.sampled(2)
def test_norm_derivatives(training, layout):
    gamma = (torch.rand(3, dtype=torch.float64) + 0.5).requires_grad_()
    beta = torch.randn(3, dtype=torch.float64, requires_grad=True)
    mean, var = torch.randn(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64) + 0.5
    x = torch.randn(4, 3, 3, 2, dtype=torch.float64).to(memory_format=layout)
    z = F.batch_norm(x, mean.clone(), var.clone(), gamma, beta, training)
    assert z.abs().min() > 1e-4  # no value at a kink

    def norm(x, gamma, beta):
        return fast_batch_norm.batch_norm(
            x, gamma, beta, mean.clone(), var.clone(), training, rectifier="relu"
        )

    args = (x.requires_grad_(), gamma, beta)
    torch.testing.assert_close(norm(*args), z.relu())
    assert gradcheck(norm, args) and gradgradcheck(norm, args)


def test_third_derivative_is_an_error():
    w = torch.randn(2, 2, 3, 3, requires_grad=True)
    y = RectifyingNorm(2)(convolution.conv2d(torch.randn(1, 2, 5, 5), w))
    (g,) = grad(y.square().sum(), w, create_graph=True)
    with pytest.raises(RuntimeError, match="no third derivative"):
        grad(g.square().sum(), w, create_graph=True)


def test_only_what_is_asked_for():
    """Frozen weights, an input without gradient and a detached output all work."""
    x, conv, norm = (torch.randn(4, 3, 6, 6), convolution.Conv2d(3, 4, 3), RectifyingNorm(4))
    y = norm(conv(x))
    assert not y.detach().requires_grad and conv.weight.requires_grad
    conv.weight.requires_grad_(False)
    (gx,) = grad(conv(x.requires_grad_()).square().sum(), x, create_graph=True)
    assert grad(gx.square().sum(), x)[0].shape == x.shape
    with torch.no_grad():
        assert norm(conv(x)).grad_fn is None


# --- whole nets against plain modules ---------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [CONTIGUOUS, LAST])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_nets_agree(dtype, tolerance, layout, training):
    net = Blocks().to(dtype).train(training)
    plain = plain_copy(net)
    x, labels = torch.randn(8, 3, 8, 8, dtype=dtype), torch.randint(5, (8,))
    net, ours = net.to(memory_format=layout), x.to(memory_format=layout)
    ours, theirs = penalised(net, ours, labels), penalised(plain, x, labels)
    for a, b in zip(ours, theirs, strict=True):
        assert_same([a] if torch.is_tensor(a) else a, [b] if torch.is_tensor(b) else b, tolerance)
    assert_same(
        [t.to(dtype) for t in net.buffers()], [t.to(dtype) for t in plain.buffers()], tolerance
    )


def test_bfloat16_under_autocast():
    """Gradients of bfloat16 point where float32's do, and arrive in float32 at the weights."""
    net = Blocks()
    x, labels = torch.randn(64, 3, 8, 8), torch.randint(5, (64,))
    exact = penalised(copy.deepcopy(net), x, labels)
    params = list(net.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, activations = net(x)
    assert all(a.dtype == torch.bfloat16 for a in activations)
    g = grad(F.cross_entropy(logits.float(), labels), params + activations, create_graph=True)
    gg, g = grad(sum(t.float().square().sum() for t in g), params), g[: len(params)]
    assert all(t.dtype == torch.float32 for t in (*g, *gg))
    for ours, theirs, least in ((g, exact[1][: len(params)], 0.998), (gg, exact[2], 0.98)):
        ours, theirs = (torch.cat([t.flatten() for t in ts]) for ts in (ours, theirs))
        assert F.cosine_similarity(ours, theirs, dim=0) > least


class CompilerMissing(RuntimeError):
    """Looks like an error of torch.compile."""

    __module__ = "torch._inductor.exc"


def test_where_compiling_fails_kernels_run_eagerly_and_one_line_says_so(monkeypatch, capfd):
    def refuse(function, **options):
        raise CompilerMissing("no such compiler\nand a long story")

    monkeypatch.setattr(compiling.shutil, "which", lambda name: name)
    monkeypatch.setattr(torch, "compile", refuse)
    x = torch.randn(4, 5, 3, 3)
    expected = RectifyingNorm(5)(x)
    assert compiling.set_compile(True)
    for _ in range(2):
        assert torch.equal(RectifyingNorm(5)(x), expected)
    line = "torch.compile failed, kernels run eagerly: no such compiler\n"
    assert capfd.readouterr().err == line


def test_what_runs_on_another_device_is_not_compiled(monkeypatch):
    monkeypatch.setattr(compiling.shutil, "which", lambda name: name)
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch, "compile", None)
    assert compiling.set_compile(True, "cuda:1")
    RectifyingNorm(5)(torch.randn(4, 5, 3, 3))  # a folding check, on the CPU
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    assert not compiling.set_compile(True, "cuda")


def test_compiled_equals_eager():
    """All derivatives agree and repeat bit for bit; another shape compiles nothing more."""
    if not compiling.set_compile(True):
        pytest.skip("no C++ compiler")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # a smaller batch; as many images as channels, and channels as pixels; a wide and large one
    shapes = (8, 4, 3, 3), (5, 4, 3, 3), (9, 9, 3, 3), (3, 40, 7, 5)
    images = {shape: torch.randn(shape).to(memory_format=LAST) for shape in shapes}
    norms, results = {shape: RectifyingNorm(shape[1]) for shape in shapes}, {}
    for compiled in (False, True, True):
        compiling.set_compile(compiled)
        for shape, x in images.items():
            norm, x = norms[shape], x.requires_grad_()
            g = grad(norm(x).sin().sum(), (x, norm.weight), create_graph=True)
            new = [*g, *grad(sum(t.square().sum() for t in g), (x, norm.weight, norm.bias))]
            old = results.setdefault((compiled, shape), new)
            assert all(map(torch.equal, old, new))
            assert_same(new, results[False, shape], 1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 6  # one for each function


# --- modules ----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [*GEOMETRIES, *FALLBACKS, dict(bias=False)], ids=str)
def test_conv_module_is_torchs(settings):
    torch.manual_seed(1)
    ours = convolution.Conv2d(4, 6, 3, **settings)
    torch.manual_seed(1)
    theirs = nn.Conv2d(4, 6, 3, **settings)
    assert_same_module(ours, theirs, torch.randn(2, 4, 7, 6))
    torch.testing.assert_close(ours(torch.ones(4, 7, 6)), theirs(torch.ones(4, 7, 6)))


@pytest.mark.parametrize(
    "settings",
    [{}, dict(momentum=None), dict(affine=False), dict(track_running_stats=False), dict(eps=0.1)],
    ids=str,
)
def test_norm_module_is_torchs(settings):
    ours, theirs = RectifyingNorm(4, **settings), nn.BatchNorm2d(4, **settings)
    for _ in range(3):
        assert_same_module(ours, theirs, 10 + torch.randn(5, 4, 3, 3), nn.ReLU())
    assert_same_module(ours.eval(), theirs.eval(), torch.randn(5, 4, 3, 3), nn.ReLU())


def assert_same_module(ours, theirs, x, after=lambda y: y):
    torch.testing.assert_close(ours(x), after(theirs(x)))
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert list(ours) == list(theirs)
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key])


def test_large_mean_does_not_cancel():
    x = 1000 + torch.randn(16, 2, 8, 8)
    norm, double = RectifyingNorm(2), nn.BatchNorm2d(2).double()
    torch.testing.assert_close(norm(x).double(), double(x.double()).relu(), rtol=1e-3, atol=1e-3)


def test_one_value_per_channel_cannot_train():
    with pytest.raises(ValueError, match="more than 1 value"):
        RectifyingNorm(2)(torch.randn(1, 2, 1, 1))
