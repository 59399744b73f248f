"""Every classifier of torchvision, and a choice of timm's: analysed, cut at half the MACs by exact groups, exported, compared.

Random weights, with zero heads and zero scales redrawn and norm statistics taken from pictures before and after the cut, so that
parity means something.
Each network gets processes of its own; what is done is kept in the JSON file and not done again. The first command measures; the
page is written by the second one alone, from that file.

    uv run python benchmarks/architectures.py [NAME...] [--part inspect] [--again] [--results docs/results/architectures.json]
    uv run python benchmarks/architectures.py --page docs/architectures.md
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS, PAGE = Path("docs/results/architectures.json"), Path("docs/architectures.md")
TIMEOUT_S = {"inspect": 300, "cut": 3600}
RATIO, FALLBACK = 0.5, 0.7
CHAOTIC = 5e-5  # a random network that amplifies rounding so much says nothing of its file; a trained one does not
# Chosen for their families, before any of them was tried.
TIMM = (
    "resnetv2_50", "seresnet50", "skresnet18", "ecaresnet26t", "res2net50_26w_4s", "dla34", "hrnet_w18_small",
    "ese_vovnet19b_dw", "gernet_s", "repvgg_a0", "rexnet_100", "ghostnet_100", "mobilenetv4_conv_small",
    "tf_efficientnetv2_b0", "eca_nfnet_l0", "convnextv2_atto", "poolformer_s12", "mixer_s32_224", "resmlp_12_224",
    "deit3_small_patch16_224", "vit_tiny_patch16_224", "eva02_tiny_patch14_224", "beit_base_patch16_224",
    "swin_tiny_patch4_window7_224", "cait_xxs24_224", "pvt_v2_b0", "levit_128s", "mobilevit_xxs", "fastvit_t8",
    "edgenext_xx_small", "efficientformer_l1", "coatnet_0_rw_224", "hgnetv2_b0", "cspdarknet53",
)  # fmt: skip


def every_name() -> list[str]:
    from vpdeploy.models.torchvision_networks import network_names

    return [*(f"torchvision:{name}" for name in network_names()), *(f"timm:{name}" for name in TIMM)]


# --- in a process of its own ------------------------------------------------------------------------------------------------


def cut_one(name: str, *, size: int | None = None, export: bool = True) -> dict[str, Any]:
    """Cut at RATIO (or FALLBACK, where that is out of reach), export, compare; the proofs are float64 and ONNX Runtime's.

    ``size``: of the input, pixels; None: the network's own. Without ``export`` nothing is said of the file.
    """
    import numpy as np
    import torch

    import vpdeploy
    from vpdeploy.api import made_up_pictures
    from vpdeploy.errors import BudgetError, VpdeployError
    from vpdeploy.models.named import model_from

    named = model_from(name)
    side = size or named.input.image_size
    pictures = made_up_pictures(side)
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    images = (images - torch.tensor(named.input.mean)[:, None, None]) / torch.tensor(named.input.std)[:, None, None]
    enliven(named.backbone)
    settle(named.backbone, images[:8], classifier=named.classifier)
    if rounding(named.backbone, images[:1]) > CHAOTIC:
        calm(named.backbone)
        settle(named.backbone, images[:8], classifier=named.classifier)
    example = images[:2]
    try:
        try:
            result, asked = vpdeploy.prune_once(named.backbone, example, macs_ratio=RATIO), RATIO
        except BudgetError:
            result, asked = vpdeploy.prune_once(named.backbone, example, macs_ratio=FALLBACK), FALLBACK
        proved = result.certificate
        settle(result.model, images[:8], classifier=named.classifier)
        exported = {}
        if export:
            spec = vpdeploy.ExportSpec(
                [str(i) for i in range(named.classes)], side, mean=named.input.mean, std=named.input.std, form="float"
            )
            with tempfile.TemporaryDirectory() as folder:
                parity = vpdeploy.export_onnx(result.model, spec, Path(folder) / "cut.onnx", images=pictures[:4])
            exported = {"torch_vs_onnx": parity.relative_error, "logit_spread": parity.logit_spread}
    except VpdeployError as e:
        return {"error": f"{type(e).__name__}: {e}"}
    return {
        "asked": asked,
        "reached": proved.reached,
        "masked_vs_pruned": max(proved.masked_vs_pruned, proved.masked_vs_pruned_random),
        "mask_effect": proved.mask_effect,
        **exported,
        "params_ratio": count(result.model) / count(named.backbone),
    }


def count(network: Any) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def enliven(network: Any) -> None:
    """No weight is zero and no scale tiny."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1 and float(parameter.abs().max()) < 1e-3:
                fan_in = parameter[0].numel() if parameter.ndim == 2 else 16
                parameter.copy_(noise * max(fan_in, 1) ** -0.5)  # a zero head; a layer scale
            elif parameter.ndim == 1 and bool((parameter == parameter[0]).all()):  # scales and shifts as they are made
                parameter.add_(0.1 * noise if float(parameter[0]) else 0.02 * noise)


def settle(network: Any, images: Any, *, classifier: str) -> None:
    """Norm statistics of ``images``. Without such norms a random network gives all pictures nearly the same logits: the
    classifier's bias takes their mean away, and adds noise of their spread, or a picture like the mean would have no logits.
    """
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum, _ = None, norm.train()
    with torch.no_grad():
        logits = network(images)
        bias = network.get_submodule(classifier).bias
        if bias is not None and not norms:
            noise = torch.randn(bias.shape, generator=torch.Generator().manual_seed(0))
            bias.add_(logits.std(dim=0).mean() * noise - logits.mean(dim=0))
    for norm in norms:
        norm.momentum, _ = 0.1, norm.eval()


def rounding(network: Any, images: Any) -> float:
    """By how much the forward in float32 is off, of the largest logit."""
    import torch

    with torch.no_grad():
        ours, right = network(images), copy.deepcopy(network).double()(images.double())
    return float((ours - right).abs().max() / right.abs().max())


def calm(network: Any) -> None:
    """Shift what batch norms give by half: a hundred random layers with a ReLU at the median amplify rounding a thousandfold."""
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                module.bias.add_(0.5)


# --- around them ------------------------------------------------------------------------------------------------------------


def done_in_a_process(name: str, part: str) -> dict[str, Any]:
    if part == "inspect":
        command = [sys.executable, "-m", "vpdeploy", "inspect", name, "--json"]
    else:
        command = [sys.executable, __file__, "--child", name]
    began = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S[part], check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {TIMEOUT_S[part]} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1], "status": done.returncode}
    found = json.loads(done.stdout[done.stdout.index("{") :])
    if part == "inspect":
        groups = found.pop("groups")
        found = {key: value for key, value in found.items() if key != "attention"}
        found["wall_s"] = time.perf_counter() - began
        found["threads"] = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
        for status in ("exact", "approximate", "excluded"):
            found[status] = sum(group["status"] == status for group in groups)
        found["reasons"] = {
            group["root"]: group["reason"]
            for group in groups
            if group["status"] == "excluded" and "network's outputs" not in group["reason"]
        }
    return found


def machine() -> dict[str, Any]:
    from vpdeploy.measure.environment import environment

    return environment()


# --- the page ---------------------------------------------------------------------------------------------------------------


def page(results: Mapping[str, Any]) -> str:
    rows = results["models"]
    lines = ["# Architectures", "", HEAD.strip(), ""]
    for library in ("torchvision", "timm"):
        mine = {name: row for name, row in sorted(rows.items()) if name.startswith(f"{library}:")}
        lines += [f"## {library}", "", summary(mine), "", *TABLE, *(table_row(n, r) for n, r in mine.items()), ""]
        lines += ["What is excluded, and why (the first three groups of each network):", ""]
        for name, row in mine.items():
            reasons = list(row.get("inspect", {}).get("reasons", {}).items())
            more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
            if reasons:
                told = "; ".join(f"`{root}`: {reason.partition(';')[0]}" for root, reason in reasons[:3])
                lines.append(f"- {name.partition(':')[2]}: {told}{more}")
        lines.append("")
    environment = results["environment"]
    lines += ["## Where", "", "```", json.dumps(environment, indent=1), "```", ""]
    return "\n".join(lines)


HEAD = """
Generated by `uv run python benchmarks/architectures.py` (with `OMP_NUM_THREADS=1` where the table says one thread) and
`... --page docs/architectures.md`. Every network at its own input size, with random weights. Analysis is what
`vpdeploy inspect NAME --json` says: seconds to find and probe all groups, and the peak memory of its process, above 100 million
parameters also in times of the weights. Then the cheapest channels by group magnitude are removed until half of the MACs remain,
by exact groups alone; masked against pruned in float64 on pictures and on noise; the pruned network's ONNX file against torch,
float32. What is not in the table has not been run with this version.
"""
COLUMNS = (
    "network", "input", "MACs", "analysis s", "threads", "peak MiB", "exact / excluded", "smallest MACs ratio", "reached",
    "masked vs pruned", "torch vs ONNX",
)  # fmt: skip
TABLE = (f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS))


def table_row(name: str, row: Mapping[str, Any]) -> str:
    seen, made = row.get("inspect", {}), row.get("cut", {})
    if "error" in seen or not seen:
        return f"| {name.partition(':')[2]} | refused: {seen.get('error', 'not run')} |" + " |" * 9
    cells = [
        name.partition(":")[2],
        str(seen["size"]),
        f"{seen['macs'] / 1e9:.2f} G",
        f"{seen['seconds']:.1f}",
        str(seen["threads"]),
        f"{seen['peak_rss_mib']:.0f}{in_weights(seen)}",
        f"{seen['exact']} / {seen['excluded']}",
        f"{seen['min_macs_ratio_exact']:.3f}",
    ]
    if "error" in made or not made:
        return f"| {' | '.join(cells)} | {made.get('error', 'not run').partition('; ')[0]} | | |"
    numbers = [f"{made['reached']:.4f}", f"{made['masked_vs_pruned']:.0e}", f"{made['torch_vs_onnx']:.0e}"]
    return f"| {' | '.join([*cells, *numbers])} |"


def in_weights(seen: Mapping[str, Any]) -> str:
    """The peak in times of the weights, where there are more than 10^8."""
    return f" ({seen['peak_rss_mib'] * 2**20 / 4 / seen['params']:.1f}x)" if seen["params"] > 10**8 else ""


def summary(rows: Mapping[str, Any]) -> str:
    cuts = [row["cut"] for row in rows.values() if "reached" in row.get("cut", {})]
    half = sum(made["asked"] == RATIO and made["reached"] <= RATIO for made in cuts)
    seconds = [row["inspect"]["seconds"] for row in rows.values() if "seconds" in row.get("inspect", {})]
    if not cuts or not seconds:
        return f"{len(rows)} networks."
    return (
        f"{len(rows)} networks: {half} reach a MACs ratio of {RATIO:g} by exact groups alone, {len(cuts) - half} more one of "
        f"{FALLBACK:g}; largest masked against pruned {max(c['masked_vs_pruned'] for c in cuts):.0e}, largest torch against ONNX "
        f"{max(c['torch_vs_onnx'] for c in cuts):.0e}; analysis takes {max(seconds):.1f} s at most."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="torchvision:NAME or timm:NAME; all if none")
    parser.add_argument("--part", choices=("inspect", "cut"), action="append", help="both if not given")
    parser.add_argument("--again", action="store_true", help="do again what is done")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, help="write the page from the results, and do nothing else")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(cut_one(asked.child)))
        return
    results = (
        json.loads(asked.results.read_text()) if asked.results.exists() else {"models": {}, "environment": machine()}
    )
    if asked.page:
        asked.page.write_text(page(results))
        return
    for name in asked.names or every_name():
        for part in asked.part or ("inspect", "cut"):
            if part in results["models"].get(name, {}) and not asked.again:
                continue
            found = done_in_a_process(name, part)
            results["models"].setdefault(name, {})[part] = found
            temporary = asked.results.with_suffix(".part")
            temporary.write_text(json.dumps(results, indent=1))
            os.replace(temporary, asked.results)
            shown = {key: value for key, value in found.items() if key != "reasons"}
            print(name, part, json.dumps(shown), flush=True)


if __name__ == "__main__":
    main()
