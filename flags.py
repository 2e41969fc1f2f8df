"""Every flag of every script, a line each: parsers, help and the checks of flags come from it.

To add a flag, write a line in the table of its script: name, kind of value, default, help, and what
stands for the value in --help. `needs=` is what it needs for an effect: otherwise it is ignored,
with a warning. `requires=` is what it cannot be without: otherwise the program ends. Both are a
text that is a rule, such as "--watch", "--scheduler multistep" or "no --phases", or a Need, whose
function gets all flags and what else is known of the run. See `engine.system.cli.Flag`.
"""

import argparse
import os
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import data
import quant_utils as qu
import utils
from analysis.study.settings import SETTING_TYPES
from analysis.weights_files import find_paths
from engine.quantization.bit_allocation import BIT_CHOICES
from engine.quantization.bit_widths import act_bit_widths_or_same, bit_widths
from engine.quantization.output_correction import INPUTS
from engine.step.gradients import DIFFERENCE_STEP, needs_double_backward
from engine.system.cli import (
    Flag,
    Need,
    Parser,
    bounded_number,
    file_name,
    label,
    project_name,
    switch,
)
from engine.system.distributed import is_restart_here
from engine.system.hardware import MEMORY_FORMATS, PRECISIONS, has_float64, parse_device
from engine.system.wandb_logger import environment_mode
from engine.training.averaging import MAX_BN_IMAGES
from models import MODELS, TIMM, TORCHVISION, has_width
from regularizers import REGULARIZERS, accepted_options, regularizer_options

Table = list[str | Flag]  # flags, each group after its title in --help

count, whole = bounded_number(int, at_least=1), bounded_number(int, at_least=0)
at_least_2 = bounded_number(int, at_least=2)
positive, not_negative = bounded_number(float, above=0), bounded_number(float, at_least=0)
fraction = bounded_number(float, at_least=0, below=1)
mean_bits = bounded_number(float, at_least=min(BIT_CHOICES), at_most=max(BIT_CHOICES))
INTEGER_FLAGS = (
    "export",
    "verify",
    "save_integers",
    "page",
)  # of one network in integer arithmetic
FILE_FLAGS = (*INTEGER_FLAGS, "save_quantized")  # of one quantized network
OUTPUT_CORRECTIONS = (*INPUTS, "auto")
RUNTIMES = (
    "onnxruntime",
    "openvino",
    "onnxruntime-web",
    "onnxruntime-node",
    "reference",
    "tract",
    "tvm",
)
PHASE_SYNTAX = "EPOCH:none or EPOCH:NAME=λ[+NAME=λ…]"
OLD_OPTIONS = {"detach_step": "hold_step"}  # old spellings of what regularizers declare


# --- what flags need --------------------------------------------------------------------------


def dataset_with(option: str) -> Need:
    """Return the need for a data set that takes the option."""
    names = [name for name in data.DATASETS if data.accepts(name, option)]
    return Need(f"--dataset {' or '.join(names)}", lambda run: data.accepts(run.dataset, option))


def existing(flag: str) -> Need:
    """Return the need for the file that a run starts from, unless it continues another."""
    return Need(
        lambda run: f"a file that is there: {getattr(run, flag)} is not",
        lambda run: run.has_checkpoint or os.path.exists(getattr(run, flag)),
    )


# fmt: off
PENALTY = Need("a regularizer", lambda run: run.regularizers)
REGULARIZER = Need("a --regularizer", lambda run: run.regularizers)
GRADIENTS = Need("a regularizer of gradients",
                 lambda run: any(map(needs_double_backward, run.regularizers)))
LPGRAD = Need("--regularizer L<P>Grad",
              lambda run: accepted_options(run.regularizer, {"only_weight_grads": True}))
WEIGHTS_ALONE = Need(
    lambda run: f"penalties of weights alone, not with {utils.beyond_weights(run)[0]}: rounding "
    "has no second derivative", lambda run: not utils.beyond_weights(run))
CONTINUES = Need("--resume or --init_from",
                 lambda run: run.resume or run.init_from or is_restart_here())
QAT_RUNS = Need("a longer run", lambda run: run.qat_from < run.n_epochs)
QAT = ["--qat_bits", QAT_RUNS]
WHOLE_STEP = Need("--compile", lambda run: run.compile or run.step == "eager")
NO_LEARNED_STEPS = Need("no --qat_bits: a compiled step has no learned step sizes",
                        lambda run: run.qat_bits is None or run.step == "eager")
PROTOCOL = Need("no --phases", lambda run: "phases" not in run.explicit_flags)
WIDE = Need(f"--model {' or '.join(filter(has_width, MODELS))}",
            lambda run: any(map(has_width, run.models)))
LOGGED = Need("another WANDB_MODE than disabled",
              lambda run: environment_mode() != "disabled")
RANDOM = Need("a stochastic scheme", lambda run: any(map(qu.is_stochastic, run.schemes)))
UNFOLDED = Need("no --fold_bn", lambda run: not run.fold_bn or run.biases == "full")
FLOAT_BIASES = Need("--fold_bn or --biases full: biases that were corrected are on no grid",
                    lambda run: run.fold_bn or run.biases == "full")
PWLQ = "pwlq among --schemes"
UNIFORM = "uniform among --schemes"
LEARNS = Need("uniform or clip among --schemes", utils.learned_schemes)
LEARNED_ROUNDING = ["--rounding adaround or qdrop", LEARNS]
ON_GRID = Need("--rounding nearest: it would move weights off the grid that was learned on",
               lambda run: not utils.learned_schemes(run))
CALIBRATES = Need("--act_bits, --output_bias_correction or --budget_bits",
                  lambda run: run.act_bits or run.output_bias_correction or run.budget_bits)
BITS_OF_LAYERS = [
    Need("no --bits: each layer gets bits of its own",
         lambda run: "bits" not in run.explicit_flags),
    "no --keep_first_last: each layer gets bits of its own",
    "no --per_layer: that is for one number of bits in all layers",
    Need("--act_bits in numbers: weights have several",
         lambda run: "same" not in (run.act_bits or ())),
]
FLOAT64 = Need("--device cpu or cuda, which have float64",
               lambda run: has_float64(run.device) or not (
                   utils.learned_schemes(run) or any(getattr(run, name) for name in INTEGER_FLAGS)))
BY_LAYER = Need("--rounding nearest: it is learned for layers one after another", ON_GRID.is_met)
ONE_FILE = Need("one FILE", lambda run: len(find_paths(run.checkpoints)) == 1)
ONE = Need(lambda run: "one FILE, one of --bits, one of --act_bits and one of --schemes: here are "
                       f"{len(find_paths(run.checkpoints))}, {len(run.bits)}, "
                       f"{len(utils.act_bits(run)) // len(run.bits)} and {len(run.schemes)}",
           lambda run: ONE_FILE.is_met(run) and len(run.schemes) == len(utils.act_bits(run)) == 1)
INTEGERS = [
    FLOAT64, "--fold_bn",
    Need(lambda run: "--act_bits from 2 to 8"
                     + (f", not {max(utils.act_bits(run))}" if run.act_bits else ""),
         lambda run: max(utils.act_bits(run)) <= 8),
    Need(lambda run: f"--bits from 2 to 8, not {max(run.bits)}", lambda run: max(run.bits) <= 8),
    Need("at most 7 bits in each layer with dorefa, which has a level more: no --keep_first_last, "
         "no --budget_bits", lambda run: "dorefa" not in run.schemes or not (
             max(run.bits) > 7 or run.keep_first_last or run.budget_bits)),
    ONE,
    Need("weights without --mean_correction and --bias_correction",
         lambda run: not (run.mean_correction or run.bias_correction)),
    Need("pwlq with --overlapping, as its other form is no sum of integers times a scale",
         lambda run: "pwlq" not in run.schemes or run.overlapping),
]
FILE_FORM = Need("--export or --page", lambda run: run.export or run.page)
FEW_BITS = Need("--bits of 4 or fewer", lambda run: (
    run.pack_weights == "int8" or run.budget_bits or min(run.bits) <= 4))
WHOLE_CODES = Need("8-bit weights, which alone --export_for vnni changes", lambda run: (
    run.export_for != "vnni" or run.budget_bits or run.keep_first_last or 8 in run.bits))
COMPARED = Need("several FILEs or --layers: there is no distributions.png",
                lambda run: run.layers or not ONE_FILE.is_met(run))
VERIFIED = [FLOAT64, ONE, Need("--export, or the file to verify",
                               lambda run: run.export or run.verify is not True), *INTEGERS]
AS_TRAINED = [
    ONE_FILE, "--precision fp32", "batch norms as they were trained: leave out --fold_bn",
    "batch norms as they were trained: no --recalibrate_bn_images",
    "weights as they were trained: leave out --equalize",
    Need(f"none of {', '.join(f'--{name}' for name in FILE_FLAGS)}",
         lambda run: not any(getattr(run, name) for name in FILE_FLAGS)),
]

# --- the flags --------------------------------------------------------------------------------

NETWORK: Table = [
    "network",
    Flag("model", utils.network_name, "ConvNet", "network, unless the record of a file names "
         "another", "{" + ",".join([*MODELS, f"{TORCHVISION}NAME", f"{TIMM}NAME"]) + "}"),
    Flag("width", utils.parse_width, 1.0,
         "of the channels of " + ", ".join(filter(has_width, MODELS)), "FACTOR", WIDE),
]
DATA: Table = [
    "data and machine",
    Flag("dataset", data.DATASETS, "CIFAR10", "data set to train and test on"),
    Flag("data_dir", str, "./data", "folder that holds the data, or that it is put into"),
    Flag("image_size", utils.parse_image_size, data.IMAGE_SIZE, "ImageFolder: height and width to "
         "crop and resize to", "PIXELS", dataset_with("image_size")),
    Flag("workers", whole, data.WORKERS, "ImageFolder: processes that decode images, beside each "
         "training process; 0: itself", needs=dataset_with("workers")),
    Flag("cache_images", not_negative, data.CACHE_GB, "ImageFolder: keep the decoded images of "
         "training, or of testing, in memory up to this size", "GB", dataset_with("cache_images")),
    Flag("batch_size", count, 128, "images per step"),
    Flag("holdout", count, None, "test on the last N training images, which are then not trained "
         "on, in place of the test set: for choices that must not see it"),
    Flag("device", parse_device, "auto", "auto: a GPU if there is one; cpu, cuda:1, mps", "NAME"),
    Flag("memory_format", MEMORY_FORMATS, "channels_last", "order of activations in memory"),
    Flag("seed", whole, 242, "random seed"),
]
WANDB: Table = [
    "Weights & Biases (offline where no key is configured)",
    Flag("wandb_project", project_name, os.environ.get("WANDB_PROJECT") or "RegulQuant",
         "project to log to"),
    Flag("wandb_entity", str, None, "user or team that owns the project"),
    Flag("wandb_group", label(128), None, "runs that belong together", "NAME", LOGGED),
    Flag("wandb_tags", label(64), [], "words to filter runs by", "TAG", LOGGED, nargs="+"),
    Flag("wandb_notes", label(10_000), None, "what the run is for", "TEXT", LOGGED),
    switch("log_model", "log the weights, too, as an artifact", needs=LOGGED),
]
TRAINING: Table = [
    "run",
    Flag("run_name", str, None, "name of the run; None: made of model, data set and penalty"),
    Flag("save_file", str, None, "file to save to, .pt is added; None: the run's name"),
    switch("save_preregularized_model", "save the weights before it in <…>_preregul.pt", PENALTY),
    switch("watch", "log histograms of every parameter and gradient", needs=LOGGED),
    Flag("watch_freq", count, 1, "with --watch, log histograms every N batches", needs="--watch"),
    "start, checkpoints and resuming",
    Flag("checkpoint_every", count, 1, "epochs between checkpoints, which are written to <…>.ckpt"),
    Flag("checkpoint_minutes", positive, 10.0, "minutes between checkpoints inside an epoch", "M"),
    switch("resume", "continue from this run's checkpoint, or begin where there is none"),
    Flag("init_from", file_name, None, "start from another run's checkpoint: its weights, "
         "momentum, schedule and epoch", "CKPT", requires=existing("init_from")),
    Flag("init_weights", file_name, None, "start from the weights in a .pt file, at epoch 0", "PT",
         requires=[existing("init_weights"), "no --init_from: that has weights already"]),
    switch("new_head", "--init_weights: leave out a last layer of other classes", "--init_weights"),
    switch("allow_changed_settings", "continue although settings differ", CONTINUES,
           was="override"),
    *NETWORK,
    "training",
    Flag("criterion", utils.CRITERIA, "CE", "loss, without the penalty"),
    Flag("label_smoothing", fraction, 0.0, "part of each label that all classes share", "E"),
    Flag("n_epochs", count, 25, "epochs to train"),
    Flag("lr", positive, 0.1, "learning rate at the start", "LR"),
    Flag("scheduler", utils.SCHEDULERS, "none", "of the learning rate; cosine: to 0 over the run"),
    Flag("gamma", positive, 0.99, "factor of the learning rate, each epoch (exponential) or "
         "milestone (multistep)", "FACTOR", "--scheduler exponential or multistep"),
    Flag("milestones", utils.parse_milestones, "default", "epochs at which multistep lowers the "
         "rate: after 1/2 and 5/6 of the run, after 1/2, at 25 and 50, or the epochs given, as in "
         "6,8", "{" + ",".join(utils.MILESTONES) + ",EPOCH[,EPOCH…]}", "--scheduler multistep"),
    Flag("momentum", not_negative, 0.9, "momentum of SGD", "M"),
    Flag("weight_decay", not_negative, 5e-4, "weight decay of SGD", "D"),
    Flag("train_subset", count, None, "train on the first N images only, for a quick look"),
    "precision and batch norm",
    Flag("precision", PRECISIONS, "auto", "of convolutions; auto: bf16 where that is fast"),
    switch("compile", "compile the element-wise kernels where a compiler is present", default=True),
    Flag("step", ("eager", "compiled"), "eager", "compiled: forward, backward and penalty as one "
         "function, after minutes of compiling, on a GPU with CUDA graphs",
         requires=[WHOLE_STEP, NO_LEARNED_STEPS]),
    Flag("winograd", ("auto", "off"), "auto", "3×3 convolutions of many channels by Winograd's "
         "algorithm; auto: where that is faster, on processors with AVX2 and no AVX-512"),
    Flag("cuda_graph", bool, ignored="--step compiled took its place"),
    switch("sync_bn", "under torchrun, take batch statistics over all processes", default=True),
    Flag("freeze_bn_from", count, None, "from epoch N on batch norms use and keep their running "
         "statistics: the gradients are those of the network that is quantized"),
    switch("no_test_penalty", "do not measure the penalty on the test set after each epoch",
           PENALTY),
    Flag("ema", fraction, None, "also average the weights exponentially, with this decay a step, "
         "such as 0.999, and save the average in <…>_ema.pt; None: no average", "DECAY"),
    Flag("recalibrate_bn_images", at_least_2, None, "training images for the batch norms of "
         f"averaged weights; None: {MAX_BN_IMAGES}, or all if there are fewer", needs="--ema"),
    "quantization-aware training",
    Flag("qat_bits", utils.parse_qat_bits, None, "train with weights rounded to W bits, and inputs "
         "of layers to A bits (None: not at all), 2 to 16, with learned step sizes (LSQ)", "W[,A]",
         QAT_RUNS, ["no --ema: averaged weights have no learned steps", WEIGHTS_ALONE]),
    Flag("qat_from", whole, 0, "epochs in full precision before --qat_bits", needs=QAT),
    switch("keep_first_last", "--qat_bits: at least 8 bits in the first and last layer", QAT),
]
ONE_PENALTY: Table = [
    "regularizer",
    Flag("regularizer", str, "none",
         lambda: f"penalty: none, {', '.join(REGULARIZERS)}; <P> is 1, 2, 3, …"),
    Flag("lmbda", not_negative, 0.01, "λ, factor of the penalty", "λ", REGULARIZER, also="lambda"),
    Flag("first_regularized_epoch", whole, 0, "epochs without penalty", needs=REGULARIZER),
    switch("no_activation_gradients", "L<P>Grad: gradients of weights only", needs=LPGRAD),
]
PHASES: Table = [
    "phases",
    Flag("first_variance_epoch", whole, 70, "epoch when VarianceNorm begins", needs=PROTOCOL),
    Flag("variance_lmbda", not_negative, 1.25, "λ of VarianceNorm", "λ", PROTOCOL),
    Flag("first_gradient_epoch", whole, 90, "epoch when L<P>Grad is added to it", needs=PROTOCOL),
    Flag("gradient_lmbda", not_negative, 0.05, "λ of L<P>Grad", "λ", PROTOCOL),
    Flag("P", count, 2, "order of L<P>Grad's norm", needs=PROTOCOL),
    switch("activation_gradients", "L<P>Grad: gradients of activations, too", needs=PROTOCOL),
    Flag("phases", str, None, f"any list of phases instead, each {PHASE_SYNTAX}, where "
         "L<P>Grad@weights leaves the gradients of activations out", "PHASE", nargs="+"),
]
PENALTIES: Table = [
    "options of regularizers",
    Flag("lmbda_warmup", not_negative, 0.0, "raise λ from 0 over these", "EPOCHS", PENALTY),
    Flag("penalty_every", count, 1, "penalize every K-th batch of an epoch, times K", "K", PENALTY),
    Flag("penalty_gradient", ("exact", "difference"), "exact", "of a penalty of gradients: exact, "
         "or from a difference of gradients: an estimate for one plain step", needs=GRADIENTS),
    Flag("penalty_step", positive, DIFFERENCE_STEP, "--penalty_gradient difference: part of its "
         "norm by which a tensor moves", "EPS", ["--penalty_gradient difference", GRADIENTS]),
    Flag("track", utils.regularizer_name, [], "also log these, with λ = 1, after each epoch, on "
         "one fixed batch in evaluation mode, without penalizing them", "NAME", nargs="+"),
]
QUANTIZATION: Table = [
    Flag("checkpoints", str, None, ".pt files of weights or .ckpt checkpoints, or globs of them",
         "FILE", nargs="+", is_positional=True),
    *NETWORK,
    "what is quantized, and how",
    Flag("bits", bit_widths, [4, 5, 6, 7, 8], "of weights: 2 to 16, or ranges: 4-8", nargs="+"),
    Flag("budget_bits", mean_bits, None,
         f"in place of --bits: each layer gets {', '.join(map(str, BIT_CHOICES))}, at most B per "
         "weight on average, so that the sum of the rises of the loss with one layer quantized, on "
         "--calibration_images, is least", "B", requires=BITS_OF_LAYERS),
    Flag("schemes", qu.QUANTIZERS, ["uniform", "dorefa", "pwlq"], "of weights; dorefa rounds at "
         "random, pwlq has the levels of one more bit, clip is uniform in the range of least error",
         nargs="+"),
    Flag("trials", count, 3, "seeds, for each quantizer that rounds at random", needs=RANDOM),
    switch("per_channel", "one range per output channel; without it one per layer"),
    Flag("biases", ("published", "weight", "full"), "published", "quantize biases as published (on "
         "their weight's grid, with pwlq in a range of their own), always on their weight's grid, "
         "or, as integer engines do and with --fold_bn, not at all (full)", needs=UNFOLDED),
    switch("keep_first_last", "quantize the first and the last layer, and with --act_bits their "
           "inputs, to 8 bits where the others have fewer, as many papers do"),
    switch("show_plan", "print which tensors are quantized, to how many bits, in which range"),
    "batch norms and corrections",
    switch("fold_bn", "fold batch norms into the convolutions first, with full biases"),
    switch("equalize", "then equalize the ranges of each two consecutive layers' weights, channel "
           "by channel (cross-layer equalization); with files to deploy not across ReLU6"),
    Flag("recalibrate_bn_images", at_least_2, None, "training images for new batch-norm "
         "statistics; None: keep the old", "N", "batch norms: leave out --fold_bn",
         was="bn_images"),
    switch("mean_correction", "restore each output channel's mean after quantizing the weights",
           requires=["no --bias_correction", ON_GRID]),
    switch("bias_correction", "the same, then scale it to its standard deviation, which moves the "
           "mean again",
           requires=["no --mean_correction", ON_GRID]),
    Flag("output_bias_correction", OUTPUT_CORRECTIONS, None, "then put the mean error of each "
         "layer's outputs back through its bias, layer by layer, measured on --calibration_images: "
         "with inputs of the quantized network (no value, or quantized), of the unquantized one "
         "(float), or with what changes predictions on those images less (auto)",
         requires=[FLOAT_BIASES, "no --recalibrate_bn_images: that moves the means again"],
         nargs="?", const="quantized"),
    "rounding of weights",
    Flag("rounding", ("nearest", "adaround", "qdrop"), "nearest", "round weights to nearest, or "
         "learn whether up or down keeps the output of their layer (AdaRound) or of a block of "
         "layers with --act_bits (QDrop)", needs=LEARNS, requires=FLOAT64),
    Flag("rounding_images", count, 1024, "training images for adaround and qdrop",
         needs=LEARNED_ROUNDING),
    Flag("rounding_steps", count, 500, "steps of adaround in each layer, of qdrop in each block",
         needs=LEARNED_ROUNDING),
    Flag("distribution", (*qu.DISTRIBUTIONS, "search"), "norm", "breakpoint of least expected "
         "error for normal or Laplace weights, or of least measured error", needs=PWLQ),
    switch("approximate", "breakpoint from the paper's closed form, not the exact optimum",
           needs=[PWLQ, "--distribution norm or laplace"]),
    switch("overlapping", "quantize the tails on the uniform grid of the whole range", needs=PWLQ),
    Flag("step_size", qu.STEP_SIZES, "half", "how far beyond its largest code uniform's largest "
         "weight lies: half a step as published; a full one, which makes steps finer and cuts off "
         "large positive weights; or, in each range, what has less squared error (auto)",
         needs=UNIFORM),
    Flag("clip_p", bounded_number(float, at_least=1), 2.4, "exponent of the error that the range "
         "is chosen by; 2: squared error", "P", "clip among --schemes"),
    Flag("steps_from", file_name, None, "also use the learned step sizes in this record of a "
         "training with --qat_bits: a row of scheme lsq", "JSON", requires=AS_TRAINED),
    "activations",
    Flag("act_bits", act_bit_widths_or_same, None, "of inputs of layers and pooling; same: as the "
         "weights; None: full precision", "{2..16,same}", requires="--precision fp32", nargs="+"),
    switch("quantize_sums", "also quantize inputs of sums, products, concatenations", "--act_bits"),
    Flag("act_symmetry", ("symmetric", "asymmetric"), "symmetric", "asymmetric: a zero point for "
         "inputs that may be negative", needs="--act_bits"),
    Flag("calibration", qu.CALIBRATIONS, "topk_median", "range of an input: median of its 10 "
         "largest and smallest values, all but 0.01 %% on each side, the extremes, or least "
         "squared error (mse)", needs="--act_bits"),
    Flag("calibration_images", count, 512, "training images for --calibration, "
         "--output_bias_correction and --budget_bits", needs=CALIBRATES),
    "what is measured",
    switch("strict", "refuse a network of which a product or a weight would stay in float"),
    switch("avg_in_layer", "divide each layer's squared error by its number of weights"),
    switch("per_layer", "also quantize one layer's weights at a time, without --keep_first_last, "
           "--output_bias_correction and --recalibrate_bn_images, and expand the loss in their "
           "change",
           requires=["--precision fp32", BY_LAYER]),
    Flag("per_layer_images", count, 512, "training images for --per_layer", needs="--per_layer"),
    Flag("precision", PRECISIONS, "fp32", "of convolutions; auto: bf16 where that is fast"),
    Flag("test_subset", count, None, "measure on the first N test images only, for a quick look"),
    *DATA,
    "output",
    Flag("output", str, None, "folder for tables and plots; None: that of the first file", "DIR"),
    switch("no_plots", "write tables only, no plots"),
    Flag("layers", str, None, "layers in distributions.png, such as layer0.0; None: with several "
         "files, the five in which they differ most", "LAYER", nargs="+", needs="no --no_plots"),
    switch("absolute_weights", "distributions.png: not in units of the layer's standard deviation",
           needs=["no --no_plots", COMPARED]),
    "files to deploy: of one FILE, one of --bits, one of --schemes",
    Flag("export", file_name, None, "write an ONNX model of integers, uint8 images to logits, and "
         "measure the same integer arithmetic", "ONNX", requires=INTEGERS),
    Flag("verify", file_name, None, "compare the file of --export, or this one, in ONNX Runtime "
         "with the simulation and float32", "ONNX", requires=VERIFIED, nargs="?", const=True),
    Flag("runtimes", RUNTIMES, ["onnxruntime"], "what --verify runs the file in, each as users "
         "start it; -web and -node are packages of Node.js, reference is ONNX's own evaluator, "
         "tract is in Rust, tvm is of requirements-tvm.txt",
         needs="--verify", nargs="+"),
    Flag("pack_weights", ("int8", "int4", "int2"), "int8", "--export: weights of up to 4 bits in "
         "half a byte each (int4), those of 2 bits also in a quarter (int2)",
         needs=[FILE_FORM, FEW_BITS]),
    Flag("export_for", ("all", "vnni", "litert"), "all", "--export: all is exact everywhere; vnni "
         "has 8-bit weights that are faster with VNNI and wrong on x86 without it; litert has "
         "inputs as int8, for which ONNX Runtime has slow kernels only",
         needs=[FILE_FORM, WHOLE_CODES]),
    Flag("page", file_name, None, "write a page that runs the network in a browser, in integers "
         "and in floating point, on 100 test images", "HTML", requires=INTEGERS),
    Flag("save_quantized", file_name, None, "write a state_dict of floats, of the first of several "
         "--trials", "PT", requires=ONE),
    Flag("save_integers", file_name, None, "write the integers of the weights packed into b bits, "
         "with scales and biases", "SAFETENSORS", requires=INTEGERS),
    *WANDB,
    Flag("n_epochs", ignored="nothing is trained here"),
    Flag("lr", ignored="nothing is trained here"),
]


def study_network(text: str) -> str:
    """Return the text if it is NAME or NAME@WIDTH, a network of --models: an argparse type."""
    name, at, width = text.rpartition("@")
    name = utils.network_name(name if at else text)
    if not at:
        return name
    if not has_width(name):
        raise argparse.ArgumentTypeError(f"{text!r}: {name} has no width")
    return f"{name}@{utils.parse_width(width):g}"


def study_flags(variants: Iterable[str], settings: Mapping[str, Any]) -> Table:
    """Return the flags of study.py with its `variants`; `settings` are those of a new study."""
    runs = Need("something to run", lambda run: not (run.tables or run.forget))

    def setting(name: str, help: str, metavar: str = "N") -> Flag:
        text = f"{help} (default for a new study: {settings[name]!r})"
        return Flag(name, SETTING_TYPES[name], argparse.SUPPRESS, text, metavar)

    return [
        "what is done",
        switch("plan", "print what would run and how long it takes; run none",
               requires=["no --tables", "no --forget"]),
        switch("tables", "only renew tables and figures from existing results",
               requires=["no --plan", "no --forget"]),
        Flag("forget", str, None, "delete the records whose path in the study matches, such as "
             "'seed0/*_folded/*', and what rests on them, so that the next run makes them again",
             "PATTERN", nargs="+"),
        Flag("only", str, None, f"variants that run; None: all of the grid, here "
             f"{', '.join(variants)}", "NAME", runs, nargs="+"),
        Flag("seeds", whole, [0, 1, 2], "seeds of each variant", needs=runs, nargs="+"),
        Flag("models", study_network, None, "networks, each in a folder of its own in --out; None: "
             "the one that --data_flags names, or all that --out has", "NAME[@WIDTH]", nargs="+"),
        Flag("jobs", count, None, "how many jobs run in parallel; on this machine they share the "
             "cores, so that times say little, and each gets one of the visible GPUs, in turn; "
             "None: 1, or as many as a cluster has room for", needs=runs),
        Flag("ray", str, None, "run the jobs on the Ray cluster at this address, whose machines "
             "share the working directory; local starts one on this machine", "ADDRESS", runs),
        Flag("cpus_per_job", count, 1, "cores of a job on the cluster", needs="--ray"),
        Flag("gpus_per_job", not_negative, 0.0, "GPUs of a job on the cluster, such as 0.5: two "
             "jobs share one", "X", "--ray"),
        Flag("out", str, "results/study", "folder of everything that is written", "DIR"),
        Flag("epoch_seconds", positive, None, "for --plan: seconds of an epoch of the control on "
             "all cores; None: as measured", needs="--plan"),
        "what the study is: set by the first run in --out",
        setting("n_epochs", "epochs of a run, of which the last third is regularized"),
        setting("holdout", "training images that λ is chosen by and that are not trained on then"),
        setting("train_flags", "flags of every training, as in --train_flags='--lr 0.05'", "FLAGS"),
        setting("data_flags", "flags of all jobs: --data_flags='--device cuda'", "FLAGS"),
        setting("grid", "a TOML file of other variants and quantizations", "FILE"),
    ]
# fmt: on


def common() -> Table:
    """Return what trainings share: options, also those of regularizers, data and logging."""
    options = []
    for name, option in regularizer_options().items():
        kind = bounded_number(option.kind) if option.kind in (int, float) else option.kind
        owners, defaults = option.regularizer_names, dict.fromkeys(map(str, option.defaults))
        help = f"{', '.join(owners)}: {option.help}; None: {', '.join(defaults)}"
        needs = Need(f"--regularizer {' or '.join(owners)}", partial(utils.is_option_used, name))
        options.append(Flag(name, kind, None, help, needs=needs, was=OLD_OPTIONS.get(name, "")))
    return [*PENALTIES, *options, *DATA, *WANDB]


def make_parser(description: str, table: Table, **defaults: Any) -> Parser:
    """Return a parser of the flags in the table, some with other defaults than theirs."""
    parser = Parser(description)
    flags = [entry for entry in table if isinstance(entry, Flag)]
    spellings = ["help", *(word for f in flags for word in (f.name, f.also, f.was) if word)]
    for name, option in regularizer_options().items():
        if spellings.count(name) > 1:
            owners = ", ".join(option.regularizer_names)
            parser.error(f"{owners}: an option cannot be called {name}: there is a flag --{name}")
    parser.add_flags(table)
    parser.set_defaults(**defaults)
    return parser
