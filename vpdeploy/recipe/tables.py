"""The tables of a recipe: the only definition of the keys; ``docs/recipe.md`` is generated from them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

Fraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Threads = Annotated[int, Field(ge=1, le=1024)]
BenchSide = Annotated[int, Field(ge=1, le=16384)]
CHECKPOINT_SUFFIXES = (".pt", ".pth", ".th", ".safetensors")
ARMS = ("dense", "dense+prompt", "pruned", "pruned-prompt")
Arm = Literal["dense", "dense+prompt", "pruned", "pruned-prompt"]
COUNTED = ("channel_ratio", "macs_ratio", "params_ratio")  # by a formula, of any network
RATIOS = (*COUNTED, "weight_ratio", "latency_ratio")
AMOUNTS = ("latency_ms", "file_mib", "memory_mib")
BUDGETS = (*RATIOS, *AMOUNTS)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EngineName = Literal[
    "onnxruntime-cpu",
    "onnxruntime-cuda",
    "onnxruntime-tensorrt",
    "openvino-cpu",
    "torch-eager",
    "torch-compile",
    "torch-cudagraphs",
]
Values = TypeVar("Values", bound=tuple[Any, ...])


def _each_once(values: Values) -> Values:
    twice = [value for i, value in enumerate(values) if value in values[:i]]
    if twice:
        raise PydanticCustomError("twice", "each value once: remove the second {value}", {"value": repr(twice[0])})
    return values


def _at_most_one(values: Values) -> Values:
    if max(values) > 1:
        raise PydanticCustomError("scale", "at most 1 for each colour, as pixels are in [0, 1]: divide by 255")
    return values


def _not_negative(values: Values) -> Values:
    if min(values) < 0:
        raise PydanticCustomError("scale", "at least 0 for each colour, as pixels are in [0, 1]")
    return values


def _numbered_gpu(name: str) -> str:
    if not re.fullmatch(r"cuda:\d+", name):
        raise PydanticCustomError("gpu", "'cuda:N' with the number of a GPU, such as 'cuda:1'")
    return name


Colours = Annotated[tuple[float, float, float], AfterValidator(_at_most_one), AfterValidator(_not_negative)]
Scales = Annotated[tuple[Positive, Positive, Positive], AfterValidator(_at_most_one)]


class Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelTable(Table):
    """Which network, and from which weights."""

    name: str = Field(
        description='built-in ("cifar_resnet20", 32, 44, 56, 110), "torchvision:resnet18", "timm:resnet18" (with vpdeploy[timm]), "path/to/file.py:factory" or "package.module:factory"',
        min_length=1,
    )
    weights: str | None = Field(
        default=None,
        description="a file (.pt .pth .th .safetensors), a published name (a torchvision weight name, a timm tag, or DEFAULT), or absent: then [fit] trains from scratch",
        min_length=1,
    )
    head: Literal["auto", "keep", "replace", "flm", "ilm"] = Field(
        default="auto",
        description="auto: keep when class counts agree, else replace; flm, ilm: keep the source classifier and map its classes by frequency (once; again every search epoch)",
    )
    classifier: str | None = Field(
        default=None,
        description="names the classifier when it is not the last linear layer or 1x1 convolution",
        min_length=1,
    )
    args: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments for the factory, or the torchvision or timm network"
    )


class DataTable(Table):
    """Which images."""

    name: str = Field(
        description='"digits" (embedded), "imagefolder", or a torchvision data set: cifar10, cifar100, flowers102, oxford_pets, dtd, food101, stanford_cars, svhn, gtsrb, eurosat',
        min_length=1,
    )
    root: str | None = Field(
        default=None,
        description="folder or .zip: train/CLASS/* and test/CLASS/* (with train/ and val/ alone, val is the test split), or bare CLASS/* with test_fraction",
        min_length=1,
    )
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.1, description="split off train, stratified and seeded; reported, selects nothing by itself"
    )
    test_fraction: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="test split for data that brings none"
    )
    limit_train: Annotated[int, Field(ge=0)] = Field(
        default=0, description="0 = all; otherwise a stratified, seeded subset of the training images"
    )
    limit_test: Annotated[int, Field(ge=0)] = Field(
        default=0, description="0 = all; otherwise a stratified, seeded subset of the test images, for short trials"
    )
    on_bad_image: Literal["fail", "skip"] = Field(default="fail", description="skip: counted and named in the report")
    max_pixels: Count = Field(default=50_000_000, description="larger images are bad images")
    augment: Literal["crop-flip", "crop", "flip", "none"] = Field(
        default="crop-flip",
        description="crop: shift by image_size / 8 with zero fill; flip: left and right; before canvas and prompt",
    )
    download: bool = Field(default=False, description="let torchvision download its data set into root")


class InputTable(Table):
    """From the caller's image to what the backbone sees."""

    image_size: Annotated[int, Field(ge=1, le=4096)] = Field(
        default=224,
        description="side of the resized image, pixels; absent: what the network was published for (built-in ones: 32), or 224 for your own code",
    )
    canvas_size: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        default=None, description="side of the zero-padded canvas; absent: image_size"
    )
    resize: Literal["stretch", "shorter-side-crop"] = Field(
        default="stretch", description="how an image becomes square"
    )
    mean: Colours = Field(
        default=IMAGENET_MEAN, description="per colour, in [0, 1]; absent: as the network was published", strict=False
    )
    std: Scales = Field(
        default=IMAGENET_STD, description="per colour, at most 1; absent: as the network was published", strict=False
    )

    @property
    def canvas(self) -> int:
        return self.canvas_size or self.image_size


class PixelsTable(Table):
    """The learned pixels."""

    kind: Literal["pad", "fix", "random", "none"] = Field(
        default="pad",
        description="pad: a frame of width size; fix: top-left square; random: a square moved every forward",
    )
    size: Count = Field(default=16, description="width of the frame, or side of the square, pixels")
    stages: Literal["both", "search", "tune"] = Field(
        default="both", description="where the prompt is learned; search: then none is exported"
    )

    def learned_in(self, stage: Literal["search", "tune"]) -> bool:
        """Whether there is one that learns in this stage. One that tuning learns ships."""
        return self.kind != "none" and self.stages in ("both", stage)


class TokensTable(Table):
    """Learned tokens of a vision transformer."""

    kind: Literal["vpt-deep", "vpt-shallow", "cvpt", "ffn-memory", "none"] = Field(
        default="none",
        description="vpt-deep: each block has its own, whose outputs nothing reads; vpt-shallow: they go through all blocks; cvpt: the stream looks at each block's own in an attention beside the block's; ffn-memory: hidden units beside each MLP's (docs/tokens.md)",
    )
    count: Count = Field(default=10, description="of each block")
    position: Literal["before-attention", "beside-attention", "after-attention", "before-mlp", "after-mlp"] = Field(
        default="after-attention", description="cvpt: where in the block the stream looks at them"
    )
    width: Count | None = Field(
        default=None,
        description="VPT: tokens of this width, which a linear layer that learns with them brings to that of the block; it is folded into them where a stage ends; absent: none",
    )
    init: Literal["uniform", "prototype"] = Field(
        default="uniform",
        description="where they start; uniform: as their authors draw them; prototype: as tokens of training images that their block reads (VPT)",
    )
    prototype: Literal["rows", "mean", "max", "k-means"] = Field(
        default="rows",
        description="rows: some of them; mean, max: some pooled over patches beside each other; k-means: centres of all",
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.0, description="of the tokens, in training")
    stages: Literal["both", "search", "tune"] = Field(
        default="both", description="where they are learned; search: then none are exported"
    )

    def learned_in(self, stage: Literal["search", "tune"]) -> bool:
        """As of pixels."""
        return self.kind != "none" and self.stages in ("both", stage)


class PromptTable(Table):
    """The visual prompt."""

    pixels: PixelsTable = Field(default_factory=PixelsTable)
    tokens: TokensTable = Field(default_factory=TokensTable)

    def learned_in(self, stage: Literal["search", "tune"]) -> bool:
        """Whether there is a prompt of any kind that learns in this stage. One that tuning learns ships."""
        return self.pixels.learned_in(stage) or self.tokens.learned_in(stage)


class FitTable(Table):
    """Stage 0: one dense network from which every arm starts."""

    what: Literal["auto", "none", "head", "all"] = Field(
        default="auto", description="auto: all without weights, head after a replaced head, none otherwise"
    )
    epochs: Count = Field(default=5, description="passes over the training split")
    weight_lr: Positive = Field(default=0.02, description="peak learning rate")
    batch_size: Count = Field(default=128, description="images per step")
    weight_decay: NonNegative = Field(default=5e-4, description="not on norms and biases")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.0, description="of the cross entropy")


Method = Literal[
    "vpns",
    "hydra",
    "random",
    "magnitude",
    "taylor",
    "fisher",
    "snip",
    "grasp",
    "synflow",
    "slim",
    "group_sl",
    "bip",
    "omp",
    "lth",
    "iterative",
]
_PROMPT = frozenset({"epochs", "batch_size", "prompt_lr"})
_ONCE = _PROMPT | {"warmup"}
_LEARNED = frozenset({"epochs", "batch_size", "score_lr", "score_init", "gradual"})
_TRAINED = _PROMPT | {"weight_lr"}
# What each method reads of [search], beside the prompt's part: any other key must be left at its default.
METHOD_KEYS: dict[str, frozenset[str]] = {
    "vpns": _LEARNED | {"prompt_lr", "unprompted_step", "warmup"},
    "hydra": _LEARNED,
    "random": _ONCE,
    "magnitude": _ONCE | {"norm", "rounds", "per_cost"},
    "taylor": _ONCE | {"rounds", "per_cost"},
    "fisher": _ONCE | {"rounds", "per_cost"},
    "snip": _ONCE | {"rounds", "per_cost"},
    "grasp": _ONCE | {"rounds"},
    "synflow": _ONCE | {"rounds", "per_cost"},
    "slim": _TRAINED | {"strength", "per_cost"},
    "group_sl": _TRAINED | {"strength", "per_cost"},
    "bip": _TRAINED | {"strength", "score_lr"},
    "omp": _TRAINED | {"norm", "per_cost"},
    "lth": _TRAINED | {"norm", "rounds", "per_cost"},
    "iterative": _TRAINED | {"rounds", "per_cost"},
}


class SearchTable(Table):
    """Stage 1: which channels matter, and the prompt that goes with them."""

    method: Method = Field(
        default="fisher",
        description="of one look at the dense network: fisher, taylor, random, magnitude, snip, grasp, synflow, and then the prompt learns under the mask; vpns: scores and prompt, learned on frozen weights; hydra: scores alone; with training of weights, too: iterative, slim, group_sl, bip, omp, lth (docs/methods.md)",
    )
    granularity: Literal["channel", "weight", "2:4"] = Field(
        default="channel",
        description="what is removed: channels, physically; weight: single weights become 0, under budget.weight_ratio; 2:4: two of every four along a layer's inputs",
    )
    epochs: Count = Field(
        default=5,
        description="passes over the training split; of methods that look once, for the prompt alone: without one, none",
    )
    batch_size: Count = Field(default=128, description="images per step")
    score_lr: Positive = Field(default=0.05, description="vpns, hydra, bip: Adam, cosine decay")
    prompt_lr: Positive = Field(
        default=1e-3,
        description="cosine decay, in [0, 1] pixel units; Adam, but SGD for slim, group_sl, omp, lth and iterative, which keeps the rate",
    )
    weight_lr: Positive = Field(
        default=0.01,
        description="slim, group_sl, bip, omp, lth: SGD with momentum 0.9, cosine decay; iterative: the same without decay",
    )
    strength: Positive | None = Field(
        default=None,
        description="slim, group_sl: of the penalty (1e-5, 5e-4); bip: 1 / gamma, of the weights' answer (1e-4); absent: what the authors took",
    )
    norm: Literal["scaled", "l1", "l2", "group"] = Field(
        default="scaled",
        description="magnitude, omp, lth: L2 norms of slices, each over its tensor's mean; norms of all of a group's weights; DepGraph's group norm",
    )
    rounds: Count | None = Field(
        default=None,
        description="magnitude, taylor, fisher, snip, grasp, synflow, lth, iterative (2 or more): how often scores are taken, each time of what the mask so far leaves; absent: of iterative once before each epoch and once at the end, of the others once",
    )
    per_cost: bool | None = Field(
        default=None,
        description="importance is divided by what a channel adds to the budget; not for vpns, hydra, bip (score_init has it) and grasp (of either sign); absent: for fisher and iterative alone",
    )
    score_init: Literal["scaled", "taylor", "fisher", "random"] = Field(
        default="scaled",
        description="scaled: from the group's own weight norms; taylor, fisher: that criterion of the dense network, for its cost; random: uniform in [0, 1)",
    )
    found: str | None = Field(
        default=None,
        description="found.safetensors of an earlier run of the same network and data: its scores and prompt are taken, and nothing is searched; the rest of this table has no effect",
        min_length=1,
    )
    data: DataTable | None = Field(
        default=None,
        description="[search.data], with the keys of [data]: other images to search on, by the network with a classifier for their classes; tuning and every number stay those of [data]",
    )
    unprompted_step: bool = Field(
        default=False,
        description="a second step per batch without the prompt, for the scores alone (as the authors' code does)",
    )
    gradual: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0,
        description="vpns, hydra: over this share of the steps the mask shrinks from the dense network to the budget, by the same share in every step; 0: it has the budget from the first step on",
    )
    warmup: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="how many of the epochs the prompt learns alone, on the dense network, before scores are taken",
    )

    @property
    def turns(self) -> int:
        """How often scores are taken."""
        usual = self.epochs + 1 if self.method == "iterative" else 1
        return usual if self.rounds is None else self.rounds

    @property
    def starts_for_cost(self) -> bool:
        """Whether learned scores start from importance for its cost."""
        return self.score_init in ("taylor", "fisher")

    @property
    def weighs_cost(self) -> bool:
        """Whether importance is divided by what a channel adds to the budget."""
        return self.method in ("fisher", "iterative") if self.per_cost is None else self.per_cost

    @property
    def data_needed(self) -> DataTable | None:
        """The other images that the search looks at; none where nothing is searched."""
        return self.data if self.found is None else None


class CondenseTable(Table):
    """Between search and cut: which of the prompt's tokens stay."""

    keep: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="share of the tokens; 1: all, and no stage"
    )
    score: Literal["gradient", "norm", "random"] = Field(
        default="gradient",
        description="gradient: the mean over batches of |<p, dL/dp>|, in one pass over the training images; norm, random: baselines",
    )
    scope: Literal["global", "layer"] = Field(
        default="global",
        description="global: all blocks compete, and may keep different numbers, or none; layer: each keeps its share",
    )
    batch_size: Count = Field(default=64, description="images whose gradients are summed before the absolute value")


Milliseconds = Annotated[
    Positive | None, Field(description="median milliseconds of the pruned file on [target], at most")
]
FileMib = Annotated[
    Positive | None, Field(description="of the pruned ONNX file, the larger of its forms, at most; MiB")
]
MemoryMib = Annotated[
    Positive | None,
    Field(
        description="peak resident memory of a process that runs the pruned file on [target], in the form named there, at most; MiB"
    ),
]


class LimitsTable(Table):
    """Hard limits beside the budget: as much more is removed as they ask for."""

    latency_ms: Milliseconds = None
    file_mib: FileMib = None
    memory_mib: MemoryMib = None

    @property
    def given(self) -> dict[str, float]:
        return {name: amount for name in AMOUNTS if (amount := getattr(self, name)) is not None}


class BudgetTable(Table):
    """What may remain: exactly one of the ratios and amounts; limits may stand beside it."""

    channel_ratio: Fraction | None = Field(
        default=None, description="of the channels of prunable groups, each group counted once"
    )
    macs_ratio: Fraction | None = Field(
        default=None, description="of the backbone's multiply-accumulates as it ships, without tokens"
    )
    params_ratio: Fraction | None = Field(default=None, description="of the backbone's parameters")
    weight_ratio: Fraction | None = Field(
        default=None,
        description="of the weights of convolutions and linear layers, with search.granularity weight or 2:4: the others are 0",
    )
    latency_ratio: Fraction | None = Field(
        default=None, description="of the dense file's median run time on [target], both measured in the same rounds"
    )
    latency_ms: Milliseconds = None
    file_mib: FileMib = None
    memory_mib: MemoryMib = None
    limits: LimitsTable = Field(default_factory=LimitsTable)
    round_to: Literal["auto"] | Count = Field(
        default=8,
        description="kept widths are multiples of this, or the full width, and smaller steps in groups narrower than 4 of these; auto: what a short sweep on [target] finds fast, in every group wider than it, and no more than lets one step of half of the groups take at most a tenth of the MACs",
    )
    max_removal: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.9, description="largest share that any one group may lose; 4 outputs of a layer stay in any case"
    )
    caps: dict[str, Annotated[float, Field(ge=0, lt=1)]] = Field(
        default_factory=dict,
        description='largest share that certain groups may lose, by name or pattern, the first that fits: {"conv1" = 0.25, "layer1.*" = 0.25}',
    )
    speed: bool = Field(
        default=False,
        description='beside a budget that is no time: of equally important channels those go first that take most milliseconds on [target] for each unit that the budget counts; needs importance for its cost: search.per_cost, or of vpns and hydra search.score_init = "taylor"',
    )
    allow_approximate: bool = Field(
        default=False,
        description="also cut widths over which a norm takes statistics (LayerNorm, GroupNorm): the certificate then shows how far masking and removal differ",
    )

    @property
    def kind(self) -> str:
        return next(name for name in BUDGETS if getattr(self, name) is not None)

    @property
    def requested(self) -> float:
        return getattr(self, self.kind)

    @property
    def measured(self) -> tuple[str, ...]:
        """The quantities that only [target] can tell, of the budget and of its limits."""
        asked = {self.kind.replace("latency_ratio", "latency_ms"), *self.limits.given}
        return tuple(name for name in ("latency_ms", "memory_mib") if name in asked)

    @property
    def reads_target(self) -> bool:
        """Whether another [target] would give another network."""
        return bool(self.measured) or self.round_to == "auto" or self.speed


class TargetTable(Table):
    """Where latency and memory are measured before anything is trained."""

    engine: EngineName = Field(default="onnxruntime-cpu", description="what will run the file")
    threads: Threads = Field(default=1, description="of one inference")
    batch: Annotated[int, Field(ge=1, le=4096)] = Field(default=1, description="images in one run")
    device: Literal["", "cpu"] | Annotated[str, AfterValidator(_numbered_gpu)] = Field(
        default="", description='"cuda:1": the GPU of that number; absent: the engine\'s first'
    )
    precision: Literal["fp32", "fp16", "bf16"] = Field(
        default="fp32", description="of torch and OpenVINO; ONNX Runtime runs what the file holds, which is fp32"
    )
    form: Literal["uint8", "float"] | None = Field(
        default=None,
        description="float: the backbone behind its prompt; uint8: end to end, with the resize of a bench.image_size image; absent: float where it is exported",
    )


class TuneTable(Table):
    """Stage 2: weights and prompt of the network that ships. The same for every arm."""

    what: Literal["all", "head"] = Field(
        default="all", description="which weights train beside the prompt; head: the classifier alone, as VPT has it"
    )
    epochs: Count = Field(default=20, description="passes over the training split")
    optimizer: Literal["sgd", "adamw"] = Field(default="sgd", description="sgd has momentum 0.9")
    weight_lr: Positive = Field(default=0.02, description="cosine decay")
    prompt_lr: Positive = Field(default=0.02, description="cosine decay; in [0, 1] pixel units")
    weight_decay: NonNegative = Field(default=5e-4, description="not on prompt, norms and biases")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.0, description="of the cross entropy")
    distill: Literal["auto"] | Annotated[float, Field(ge=0, le=1)] = Field(
        default="auto",
        description="share of the loss that compares with the dense network's outputs, before it was pruned; the rest compares with the labels; auto: 0.9, but 0 after a replaced or mapped head, where the dense network has hardly learned the task",
    )
    temperature: Positive = Field(
        default=2.0, description="that both networks' outputs are divided by where they are compared"
    )
    teacher: Literal["every-step", "once"] = Field(
        default="once",
        description="when the dense network is asked for its outputs: for every batch as it is augmented, a forward of it in each step; or once for each image and its mirror image, before the first step",
    )
    batch_size: Count = Field(default=128, description="images per step")


class ComputeTable(Table):
    """Where and how training runs. What auto chose is saved in the run folder and reused on resume."""

    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="of the backbone in training; auto: whichever a short measurement says is faster"
    )
    channels_last: Literal["auto", "yes", "no"] = Field(
        default="auto", description="memory layout of the backbone in training"
    )
    device: Literal["auto", "cpu", "cuda"] | Annotated[str, AfterValidator(_numbered_gpu)] = Field(
        default="auto", description='"cuda:1": the GPU of that number; auto: the first GPU, or the CPU'
    )
    workers: Literal["auto"] | Annotated[int, Field(ge=0)] = Field(
        default="auto", description="threads that decode images; auto: one per core"
    )


class CompareTable(Table):
    """Which models stand in the report."""

    arms: Annotated[tuple[Arm, ...], Field(strict=False), AfterValidator(_each_once)] | None = Field(
        default=None,
        description="dense and pruned always; dense+prompt: tuned with the prompt; pruned-prompt: search and tune without it. Absent: dense, dense+prompt (with a prompt) and pruned",
    )


class ExportTable(Table):
    """What is written for the runtime."""

    forms: Annotated[tuple[Literal["uint8", "float"], ...], AfterValidator(_each_once)] = Field(
        default=("uint8", "float"),
        description="uint8: [n, h, w, 3], everything inside; float: [n, 3, image_size, image_size] in [0, 1]",
        strict=False,
        min_length=1,
    )
    opset: Annotated[int, Field(ge=18, le=25)] = Field(default=18, description="ONNX operator set")


class BenchTable(Table):
    """How the exported files are measured."""

    engines: Annotated[tuple[EngineName, ...], AfterValidator(_each_once)] = Field(
        default=("onnxruntime-cpu",),
        description="what runs them; the first gives the headline. openvino-cpu comes with vpdeploy[openvino]; the torch engines run the network that was exported",
        strict=False,
        min_length=1,
    )
    device: Literal["", "cpu"] | Annotated[str, AfterValidator(_numbered_gpu)] = Field(
        default="", description='"cuda:1": the GPU of that number; absent: each engine\'s first'
    )
    precision: Literal["fp32", "fp16", "bf16"] = Field(
        default="fp32", description="of torch and OpenVINO; ONNX Runtime runs what the file holds, which is fp32"
    )
    batches: Annotated[tuple[Count, ...], AfterValidator(_each_once)] = Field(
        default=(1, 8), description="batch sizes", strict=False, min_length=1
    )
    threads: Annotated[tuple[Threads, ...], AfterValidator(_each_once)] = Field(
        default=(1, 2), description="of one inference", strict=False, min_length=1
    )
    seconds: Annotated[float, Field(gt=0, le=3600)] = Field(
        default=3.0, description="of measurement for each arm, form, batch and thread count"
    )
    image_size: tuple[BenchSide, BenchSide] = Field(
        default=(375, 500), description="[height, width] of the uint8 form's images", strict=False
    )


class Recipe(Table):
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(default=7, description="every random stream is derived from it")
    model: ModelTable
    data: DataTable
    input: InputTable = Field(default_factory=InputTable)
    prompt: PromptTable = Field(default_factory=PromptTable)
    fit: FitTable = Field(default_factory=FitTable)
    search: SearchTable = Field(default_factory=SearchTable)
    condense: CondenseTable = Field(default_factory=CondenseTable)
    budget: BudgetTable
    target: TargetTable = Field(default_factory=TargetTable)
    tune: TuneTable = Field(default_factory=TuneTable)
    compute: ComputeTable = Field(default_factory=ComputeTable)
    compare: CompareTable = Field(default_factory=CompareTable)
    export: ExportTable = Field(default_factory=ExportTable)
    bench: BenchTable = Field(default_factory=BenchTable)

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The arms compared, "dense" first: what the recipe names, or every arm that its prompt allows."""
        if self.compare.arms is not None:
            return tuple(arm for arm in ARMS if arm in self.compare.arms)
        ships = self.prompt.learned_in("tune")
        return ("dense", "dense+prompt", "pruned") if ships else ("dense", "pruned")


def data_tables(recipe: Recipe) -> list[tuple[str, DataTable]]:
    """Every table that names images, with its dotted name."""
    found = [("data", recipe.data), ("search.data", recipe.search.data)]
    return [(name, table) for name, table in found if table is not None]


def table_in(annotation: Any) -> type[Table] | None:
    """The table that a key of this annotation holds, where it is given; None for a key that holds a value."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, Table):
            return kind
    return None
