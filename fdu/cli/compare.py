"""``fdu compare``: erase with several divergences, draw erased against retained, and recommend one."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from fdu.cli.evaluate import Evaluate
from fdu.cli.options import GROUPS, LoadOptions, Settings, described, grouped, words_of
from fdu.comparison.launchers import Elsewhere, LauncherName, RayCluster, Slurm, check_launcher
from fdu.config import SEARCHES, TRAIN_METHODS, WITHOUT_STEPS, Count, EraseConfig, check_choice, check_number
from fdu.storage.loading import Dtype, check_dtype, check_encoder, check_resolution, choose_device
from fdu.storage.output import WEIGHTS_FOLDER
from fdu.subjects.registry import subject_of

if TYPE_CHECKING:
    from fdu.comparison.plan import Candidate

DEFAULT = "mse,squared_hellinger,jensen_shannon,pearson_chi2"
"""The default divergences: the usual loss, two that damp large errors, and one that amplifies them."""

_SETTINGS = EraseConfig.field_names()
JOBS = "jobs"
"""The folder for the logs of runs that other machines make."""
EDITS = ("ridge", "rank_tolerance")
"""Settings of the closed form alone."""
OWN = ("divergence", "s0", "seed", *_SETTINGS[_SETTINGS.index(GROUPS["files"]) :])
"""Settings of an erasure that the comparison sets itself."""


@dataclasses.dataclass
class Compare:
    """Erase with several divergences and seeds, plot erased against retained, and recommend one.

    OUT receives comparison.html, its charts as .svg, its pictures in front.png, comparison.md, comparison.json and
    runs.jsonl with one line per run. Its folder images/ holds a few images of each run with the first seed, and its
    folder cache/ data that runs share; you may delete the cache. The same command resumes an interrupted comparison.
    With more divergences, values of s0 or seeds, it adds the missing runs.
    """

    examples: ClassVar[tuple[str, ...]] = (
        "fdu compare digits --target three --anchor eight --max_train_steps 40 --preservation_weight 0 --s0 1 10 "
        "--out comparison",
        "fdu compare digits --target red --anchor black --alpha -1:2:7 --prefer preservation --out by-alpha",
        "fdu compare emoji --target fox --anchor wolf --methods closed_form,lora --robust 0,2 --out robust",
        "fdu compare org/model --target monet --anchor painting --concept_type style --device cuda --out comparison",
    )

    model: Positional[str]
    """A pipeline's folder, a .safetensors file, a hub id (org/name), "emoji" or "digits"."""
    target: str
    """Concept to erase."""
    anchor: str
    """Concept that replaces it."""
    out: Path
    """Folder for the results: a new or empty folder, or the folder of a comparison with the same settings."""
    divergences: str | None = None
    """Names listed by `fdu divergences`, separated by commas. Default without --alpha:
    mse,squared_hellinger,jensen_shannon,pearson_chi2."""
    alpha: str | None = None
    """Alpha divergences as low:high:count, such as -1:2:7. At 0 and 1 these are reverse_kl and kl."""
    s0: tuple[float, ...] = (EraseConfig.s0,)
    """Values of s0, the median of s at the start, > 0. Larger values make divergences differ more."""
    methods: str | None = None
    """Values of --train_method to compare, separated by commas, such as closed_form,lora. closed_form, which has no
    divergence, is one candidate."""
    robust: str | None = None
    """Values of --adversarial_rounds to compare, separated by commas, such as 0,2. Implies --attack."""
    attack: bool = False
    """Attack each erased model, and show how often the target stays away (held). About doubles the time."""
    seeds: int = 3
    """Number of seeds per divergence and value of s0, >= 1: the seeds 0, 1, ..."""
    prefer: Literal["preservation", "balanced", "erasure", "robustness"] = "balanced"
    """What the recommendation favours; robustness needs --attack. The page shows the recommendation for each."""
    images_per_class: int = 32
    """Images per class for the judge, >= 2. At least 6 are needed to name a winner."""
    prompts: str | None = None
    """Prompts to draw, as for `fdu evaluate`: a concept set of the package or a .txt file in that format. Default: the
    set with the target's name, otherwise the training prompts and everyday subjects. Emoji and digits have
    their own."""
    judge: str | None = None
    """Image-text encoder that judges, as for `fdu evaluate`. Emoji and digits have their own."""
    judged_inference_steps: int | None = None
    """Sampling steps per judged image, >= 1. Default: the pipeline's own; 20 on emoji and digits."""
    judged_guidance_scale: float | None = None
    """Guidance scale of judged images, >= 0. Default: the pipeline's own; 2 on emoji, 3 on digits."""
    workers: int | None = None
    """Worker processes, >= 1. If more than one, each uses one thread. Default: 1; on emoji and digits on a CPU, one per
    core. With --launcher slurm: the most jobs at once; with --launcher ray: the cores of a cluster started here."""
    launcher: LauncherName = "local"
    """Where the runs are made: local, in processes on this machine; ray, on a Ray cluster; slurm, as jobs of Slurm. All
    machines must share the folder OUT and have fdu installed. Each run gets a core, and a GPU with --device cuda."""
    ray_address: str | None = None
    """With --launcher ray: host:port of the cluster, or auto for the one that this machine is part of. Default: one
    started on this machine."""
    slurm_partition: str | None = None
    """With --launcher slurm: the partition. Default: the cluster's own."""
    slurm_minutes: int | None = None
    """With --launcher slurm: minutes after which a run is ended, >= 1. Default: 240."""
    concept_type: Literal["object", "style"] = "object"
    """Which prompt templates the names are put into. Emoji and digits have their own."""
    dtype: Dtype = "auto"
    """Dtype of the weights. auto: float32, or the dtype of --mixed_precision."""
    device: str = "auto"
    """Device to run on: cpu, cuda, mps, or auto for the first accelerator found."""
    loading: Annotated[OmitArgPrefixes[LoadOptions], arg(name="")] = dataclasses.field(
        default_factory=described(LoadOptions)
    )
    settings: Annotated[OmitArgPrefixes[Settings], arg(name="")] = dataclasses.field(default_factory=grouped(OWN))

    def prepare(self, command: str) -> Callable[[], None]:
        """Check the arguments and return the work."""
        from fdu.comparison.plan import Comparison, Drawing, distinct, read_alpha

        model = subject_of(self.loading.location(self.model))
        if self.judge is not None:
            check_encoder(self.judge)
        check_number("seeds", self.seeds, Count)
        if self.workers is not None:
            check_number("workers", self.workers, Count)
        device = self._device()
        launcher = self._launcher(device)
        attacked = self.attack or self.robust is not None
        if self.prefer == "robustness" and not attacked:
            raise ValueError("--prefer robustness needs an attack on every model; add --attack")
        base = self._base()
        if not TRAIN_METHODS[base.train_method].trains:
            raise ValueError(
                f"--train_method {base.train_method} gives the same model for every divergence; choose a method that "
                f"trains, or compare it with others: --methods {base.train_method},lora"
            )
        check_resolution(model.folder, base.size)
        names = [] if self.divergences is None else [name.strip() for name in self.divergences.split(",")]
        names += [] if self.alpha is None else read_alpha(self.alpha)
        divergences, same_as = distinct(names or DEFAULT.split(","), base.variational)
        comparison = Comparison(
            model=model.model,
            pairs=((self.target, self.anchor),),
            candidates=self._candidates(divergences),
            attacked=attacked,
            seeds=tuple(range(self.seeds)),
            base=base,
            concept_type=self.concept_type,
            drawing=Drawing(
                images_per_class=self.images_per_class,
                images_of_target=self.images_per_class,
                **self._draw_settings(),
            ),
            dtype=check_dtype(self.dtype, base.mixed_precision),
            device=device,
            prompts=self.prompts,
            judge=self.judge,
            quantization=self.loading.quantization,
            offload=self.loading.offload,
            variant=self.loading.variant,
            base_lora=self.loading.base_lora,
        )
        comparison.check_names()
        self.loading.check(*map(comparison.config, comparison.runs()))
        from fdu.comparison.results import CACHE, RUNS, check_folder, former_runs, read_results, write_record

        check_folder(self.out, comparison)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = self.workers or (cores if comparison.device == "cpu" and model.light else 1)

        def work() -> None:
            from fdu.comparison.page import PAGE, table, write_page
            from fdu.comparison.runs import jobs
            from fdu.comparison.sweep import sweep
            from fdu.report import IMAGES_FOLDER

            for name, other in same_as.items():
                print(f"{name} trains the same model as {other} and is not run again.")
            if former := former_runs(self.out):
                runs = "1 run" if former == 1 else f"{former} runs"
                print(f"{self.out} holds {runs} that this version of fdu cannot read; all runs are made again.")
            write_record(self.out, comparison, command)
            try:
                processes = min(workers, len(comparison.runs()))
                todo = jobs(comparison, self.out / CACHE, self.out / IMAGES_FOLDER)
                records = sweep(todo, self.out / RUNS, processes, launcher=launcher)
            except KeyboardInterrupt:
                print(f"\nfdu: finished runs are in {self.out}; resume with the same command", file=sys.stderr)
                raise
            results = read_results(comparison, records)
            chosen = results.recommendations[self.prefer]
            again = self._erase_command(base, chosen.candidate) if chosen.usable else ""
            then = [again, self._evaluate_command()] if again else []
            write_page(self.out, results, self.prefer, same_as, command, then, model.notes)
            write_record(self.out, comparison, command, results)
            print(f"\n{table(results.standings, same_as)}\n{chosen.headline}. {' '.join(chosen.sentences)}")
            if results.mixed:
                print(results.mixed_note)
            print(f"\npage     {self.out / PAGE}" + (f"\nto run it: {again}" if again else ""))

        return work

    def _device(self) -> str:
        """The device of the runs.

        Raises:
            ValueError: it cannot be used here, or is not named although the runs are made elsewhere.
        """
        if self.launcher == "local":
            return choose_device(self.device)
        if self.device not in ("cpu", "cuda"):
            raise ValueError(
                f"device {self.device!r} does not say what the machines of launcher {self.launcher!r} have; name cuda, "
                "for one GPU per run, or cpu"
            )
        return self.device

    def _launcher(self, device: str) -> Elsewhere | None:
        """What makes the runs elsewhere; None if this machine makes them.

        Raises:
            ValueError: an option of another launcher, or a number out of range.
            MissingPackage, RuntimeError: as :func:`fdu.comparison.launchers.check_launcher`.
        """
        for name, launcher in {"ray_address": "ray", "slurm_partition": "slurm", "slurm_minutes": "slurm"}.items():
            if getattr(self, name) is not None and self.launcher != launcher:
                raise ValueError(f"{name} has no effect without --launcher {launcher}; add that, or leave it out")
        if self.ray_address is not None and self.workers is not None:
            raise ValueError("workers has no effect on a cluster that runs already; leave out workers or ray_address")
        if self.slurm_minutes is not None:
            check_number("slurm_minutes", self.slurm_minutes, Count)
        check_launcher(self.launcher)
        folder, gpus = self.out / JOBS, int(device == "cuda")
        if self.launcher == "ray":
            return RayCluster(folder, self.ray_address, self.workers, gpus)
        if self.launcher == "slurm":
            return Slurm(folder, self.slurm_partition, self.slurm_minutes, self.workers, gpus)
        return None

    def _base(self) -> EraseConfig:
        """The settings that all candidates share.

        Raises:
            ValueError, TypeError: as :class:`fdu.EraseConfig`, or a setting beside the option that compares its values.
        """
        typed, default = self.settings.typed(), EraseConfig()
        given = {"methods": (self.methods, "train_method"), "robust": (self.robust, "adversarial_rounds")}
        for option, (values, name) in given.items():
            if values is not None and typed[name] != getattr(default, name):
                raise ValueError(f"--{name} has no effect beside --{option}; leave one of them out")
        if self.robust is not None:  # the largest number, so that other settings of the searches make sense
            typed["adversarial_rounds"] = max(_counts(self.robust))
        if self.methods is not None and typed["init"] == "none":
            typed |= {name: getattr(default, name) for name in EDITS}  # those of the closed form alone
        return EraseConfig(**typed)

    def _candidates(self, divergences: Sequence[str]) -> tuple[Candidate, ...]:
        """Every divergence and s0 with every method and number of rounds; of a method that does not train, one."""
        from fdu.comparison.plan import Candidate

        ways: list[tuple[tuple[str, Any], ...]] = [()]
        if self.methods is not None:
            names = [name.strip() for name in self.methods.split(",")]
            for name in names:
                check_choice("methods", name, TRAIN_METHODS)
            ways = [(("train_method", name),) for name in names]
        if self.robust is not None:
            ways = [(*way, ("adversarial_rounds", count)) for way in ways for count in _counts(self.robust)]
        every = [Candidate(name, s0, way) for way in ways for s0 in self.s0 for name in divergences]
        trained = [one for one in every if one.trains]
        if not trained and (self.divergences or self.alpha or self.s0 != Compare.s0):
            raise ValueError(f"methods {self.methods} has no divergence; leave out --divergences, --alpha and --s0")
        typed, default = self.settings.typed(), EraseConfig()
        edits = tuple((name, typed[name]) for name in EDITS if typed[name] != getattr(default, name))
        computed = [Candidate(default.divergence, default.s0, one.others + edits) for one in every if not one.trains]
        return tuple(dict.fromkeys([*computed, *trained]))

    def _draw_settings(self) -> dict[str, Any]:
        """The settings of sampling for judged images."""
        typed = {"num_inference_steps": self.judged_inference_steps, "guidance_scale": self.judged_guidance_scale}
        given: dict[str, Any] = {name: value for name, value in typed.items() if value is not None}
        try:
            return dataclasses.replace(subject_of(self.loading.location(self.model)).sampling, **given).settings()
        except ValueError as error:
            raise ValueError(f"judged_{str(error).removeprefix('num_')}") from None

    def _erase_command(self, base: EraseConfig, chosen: Candidate) -> str:
        """The command line of the erasure with a candidate's settings, and all shared ones that are not the default."""
        words = ["fdu", "erase", self.model, "--target", self.target, "--anchor", self.anchor]
        defaults = EraseConfig().as_dict()
        always = chosen.settings if chosen.trains else dict(chosen.others)
        settings = {**base.as_dict(), "learning_rate": base.learning_rate, **always}
        defaults["learning_rate"] = None
        searches = settings["adversarial_rounds"] > 0
        used = {*settings} if chosen.trains else {*WITHOUT_STEPS, *(SEARCHES if searches else ())}
        used = {name for name in used if searches or not name.startswith("adversarial")}
        told = {name for name, value in settings.items() if name in always or value != defaults[name]}
        words += words_of({name: value for name, value in settings.items() if name in used & told})
        if self.concept_type != "object":
            words += ["--concept_type", self.concept_type]
        if self.dtype != "auto" or not chosen.trains:
            words += ["--dtype", check_dtype(self.dtype, base.mixed_precision)]
        words += self.loading.words()
        # The device is always named, because auto may find another device next time.
        return shlex.join([*words, "--device", self._device(), "--out", WEIGHTS_FOLDER])

    def _evaluate_command(self) -> str:
        """The command line that judges that erasure, drawn and judged as the comparison was."""
        given = {
            "prompts": self.prompts,
            "judge": self.judge,
            "images_per_class": self.images_per_class,
            "num_inference_steps": self.judged_inference_steps,
            "guidance_scale": self.judged_guidance_scale,
            "dtype": check_dtype(self.dtype, self.settings.typed()["mixed_precision"]),
        }
        # There, auto means float32 whatever the mixed precision.
        defaults = {**vars(Evaluate), "dtype": "float32"}
        words = ["fdu", "evaluate", self.model, WEIGHTS_FOLDER]
        for name, value in given.items():
            if value != defaults[name]:
                words += [f"--{name}", str(value)]
        words += self.loading.words()
        return shlex.join([*words, "--device", self._device(), "--out", "judged"])


def _counts(text: str) -> list[int]:
    """The numbers of rounds in "0,2".

    Raises:
        ValueError: not whole numbers >= 0, separated by commas.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() for word in words):
        raise ValueError(f"robust must be whole numbers >= 0, separated by commas, as in 0,2, got {text!r}")
    return [int(word) for word in words]
