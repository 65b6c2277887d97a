"""``rewrite``: a traced module and a plan in, a channel-pruned GraphModule out."""

from __future__ import annotations

from torch import nn

from chase_fx.errors import ArgumentError, PlanMismatchError
from chase_fx.graphs.channels import ChannelGraph, analyze
from chase_fx.graphs.garbage import uncollected
from chase_fx.graphs.inference import normal_tensors
from chase_fx.graphs.plan import PruningPlan
from chase_fx.graphs.recapture import Recapture
from chase_fx.graphs.traced import TracedModule, capture_of
from chase_fx.graphs.variants import Variants
from chase_fx.passes.cut import Cut
from chase_fx.passes.modules import resize, slim_tree
from chase_fx.passes.recapture import SlimRecapture

__all__ = ["channels_for", "rewrite"]


@uncollected()
@normal_tensors()
def rewrite(traced: TracedModule, plan: PruningPlan) -> TracedModule:
    """Apply a plan: slice parameters and buffers, resize modules, replace size arguments.

    ``traced`` is not changed; the result shares no tensor with it. Needs no forward.

    Raises:
        ArgumentError: ``traced`` is no traced module.
        PlanMismatchError: the plan was made for another structure.
        RewriteError: a size argument that can't be replaced, with the node and its source line.

    Example:
        >>> import torch, chase_fx
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> traced = chase_fx.trace(net, torch.zeros(1, 4))
        >>> slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(channel_sparsity=0.5))
        >>> slim.get_submodule("0")
        Linear(in_features=4, out_features=4, bias=True)
    """
    info = capture_of(traced)
    if not isinstance(plan, PruningPlan):
        raise ArgumentError(
            f"expected a PruningPlan, found {type(plan).__name__}; make one with analyze(traced).plan(...)"
        )
    channels = channels_for(traced, plan)
    cut = Cut(channels, plan)
    root = nn.Module()
    root.__dict__.update(slim_tree(traced, cut.kept))
    for name in traced.variants.names():
        delattr(root, name)
    for module in root.modules():
        resize(module, info.leaves)
    graphs = cut.graphs(traced, root)
    slim = TracedModule.build(root, (graphs[0], graphs[1] if len(graphs) > 1 else None), info, info.model, like=traced)
    slim.__dict__["plan"] = plan
    if isinstance(traced.variants.recapture, Recapture):
        slim.variants = Variants(SlimRecapture(traced.variants.recapture, channels), traced.variants.writes)
    # Where the plan left the text as it was there is nothing new to check.
    if slim.compiled_texts.keys() != traced.compiled_texts.keys():
        for graph in slim.graphs():
            graph.lint()
    return slim


def channels_for(traced: TracedModule, plan: PruningPlan) -> ChannelGraph:
    """The analysis that ``plan`` was made from, or an equal one."""
    info = capture_of(traced)
    own = {n: s for n, s in info.structure.items() if n not in info.constants}
    if dict(plan.shapes) != own:
        wrong = next((n for n in {**own, **plan.shapes} if own.get(n) != plan.shapes.get(n)), "")
        raise PlanMismatchError(
            f"the plan was made for another model: '{wrong}' is {plan.shapes.get(wrong)} in the plan, "
            f"{own.get(wrong)} in the module"
        )
    for (paths, _), (rules, _labelling) in list(info.analyses.items()):
        if paths == plan.outputs:
            channels = analyze(traced, outputs=paths, rules=rules)
            if channels.digest == plan.digest:
                return channels
    channels = analyze(traced, outputs=plan.outputs)
    if channels.digest != plan.digest:
        raise PlanMismatchError(
            f"the plan's structure {plan.digest} is not that of this module, {channels.digest}: the same tensors are "
            "coupled in another way; make the plan with analyze() on this module, with the same rules"
        )
    return channels
