"""Heads, and networks that apply a backbone and its heads to a list of views."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WeightNormLinear(nn.Module):
    """Linear layer without bias, whose rows are unit vectors times a gain per row.

    (..., in_dim) -> (..., out_dim), in the type of the weights whatever autocast says: the softmax
    of a loss divides logits by a small temperature, which multiplies their rounding errors.

    This is weight normalisation (Salimans and Kingma, 2016), computed inside `forward`: torch's
    breaks when the module is copied or wrapped. Where gains are learned, they are (out_dim, 1) as
    DINO's `weight_g`, and decay as weights do; else they are 1, and outputs of unit inputs cosines.
    """

    def __init__(self, in_dim: int, out_dim: int, learn_gain: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim))
        nn.init.trunc_normal_(self.weight, std=0.02)
        self.gain = nn.Parameter(torch.ones(out_dim, 1)) if learn_gain else None

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            weight = F.normalize(self.weight, dim=1)
            if self.gain is not None:
                weight = weight * self.gain
            return F.linear(x.to(weight.dtype), weight)


class DINOHead(nn.Module):
    """MLP, unit length, prototypes: (B, in_dim) -> (B, out_dim) logits.

    Section 3.1 of DINO (Caron et al., 2021). Under autocast the MLP runs in the lower precision;
    the unit vectors and the logits are float32.

    Args:
        in_dim: width of the backbone. out_dim: number of prototypes, K.
        use_bn: batch norm after each hidden layer.
        norm_last_layer: fix the length of every prototype at 1: more stable, or a little worse.
        hidden_dim: width of the hidden layers. nlayers: linear layers of the MLP, at least 1.
        bottleneck_dim: width of the unit vectors that are compared with the prototypes.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        nlayers: int = 3,
    ):
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(nlayers - 1):
            layers.append(nn.Linear(in_dim, hidden_dim))
            if use_bn:
                layers.append(nn.BatchNorm1d(hidden_dim))
            layers.append(nn.GELU())
            in_dim = hidden_dim
        layers.append(nn.Linear(in_dim, bottleneck_dim))
        self.mlp = nn.Sequential(*layers)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim, learn_gain=not norm_last_layer)

    def embed(self, x: Tensor) -> Tensor:
        """Unit vectors to compare with the prototypes: (B, in_dim) -> (B, bottleneck_dim)."""
        return F.normalize(self.mlp(x).to(self.last_layer.weight.dtype), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(self.embed(x))


class Projector(nn.Sequential):
    """Linear layers, with batch norm and ReLU between them: (B, widths[0]) -> (B, widths[-1]).

    The last has a bias and no batch norm, as in SwAV. The authors' code of BYOL, VICReg and Barlow
    Twins has no such bias (the losses of these two do not depend on it); SimCLR's ends with a norm.
    """

    def __init__(self, *widths: int):
        layers: list[nn.Module] = []
        for before, after in zip(widths, widths[1:-1]):
            layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU(True)]
        super().__init__(*layers, nn.Linear(widths[-2], widths[-1]))


def features_of_views(backbone: nn.Module, views: list[Tensor]) -> Tensor:
    """Features of V views, by one forward pass per resolution: (V * B, embed_dim), view by view.

    Views (B, 3, H, W) of the same size must be neighbours in the list.
    """
    groups: list[list[Tensor]] = []
    for view in views:
        if groups and groups[-1][0].shape[-2:] == view.shape[-2:]:
            groups[-1].append(view)
        else:
            groups.append([view])
    return torch.cat([backbone(torch.cat(group)) for group in groups])


class MultiViewNetwork(nn.Module):
    """A backbone and a head, applied to a list of views; see `features_of_views`.

    forward(views) -> `(features, embeddings, logits)`, view by view: the backbone's features
    (V * B, embed_dim), the head's unit vectors (V * B, bottleneck_dim) and logits (V * B, out_dim).
    """

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, views: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        features = features_of_views(self.backbone, views)
        embeddings = self.head.embed(features)
        return features, embeddings, self.head.last_layer(embeddings)


class ManyHeads(nn.Module):
    """As `MultiViewNetwork`; forward(views) -> features (V * B, embed_dim), outputs by head."""

    def __init__(self, backbone: nn.Module, heads: dict[str, nn.Module]):
        super().__init__()
        self.backbone, self.heads = backbone, nn.ModuleDict(heads)

    def forward(self, views: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        features = features_of_views(self.backbone, views)
        return features, {name: head(features) for name, head in self.heads.items()}
