"""The conversion of a detector of mmdet from its files to files, step by step."""

import copy
import json
from functools import cached_property
from pathlib import Path
from typing import Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence

from ..checkpoints.detector import load_detector
from ..configs import read_config
from ..layers.replace import replace_convolutions
from . import files
from .accuracy import LabelledImages
from .budget import Offer, Offers, choices_within, find_offers, read_budget, spend
from .conversion import Conversion, convert, images_needed
from .costs import share_of_time
from .detectors import choose_detectors_layers, find_images, load_images, stages_of
from .layers import Choice
from .report import describe_tradeoff, make_report
from .walk import watch_calls


class Settings(NamedTuple):
    """What is wanted of a conversion.

    Attributes:
        config: The detector's config.
        checkpoint: Its weights.
        cfg_options: Changes to the config.
        images: A folder of images; None for the config's training images.
        num_images: At most so many of them.
        num_val_images: At most so many labelled ones measure AP.
        parts: Which parts to convert.
        heads: Of each attention.
        kernel_size: Of each attention.
        static: Whether each attention has the same weights at every pixel.
        expansion: See :func:`sasa_det.convert.layers.choose_layers`.
        budget: What :func:`sasa_det.convert.budget.read_budget` reads, or None.
        seed: Of the choice of images and pixels.
        device: Such as ``cpu``.
    """

    config: Path
    checkpoint: str
    cfg_options: Sequence[str]
    images: Optional[str]
    num_images: int
    num_val_images: int
    parts: Sequence[str]
    heads: int
    kernel_size: int
    static: bool
    expansion: int
    budget: Optional[str]
    seed: int
    device: str


class DetectorConversion:
    """A detector that becomes an attention one: loaded, then planned, converted and written.

    Args:
        settings: What is wanted.
        out: The folder to write to.

    Raises:
        FileNotFoundError, ValueError: A file is missing or invalid, or a setting; names it.
    """

    def __init__(self, settings: Settings, out: Path) -> None:
        self.settings, self._out = settings, out
        self.budget = read_budget(settings.budget) if settings.budget else None
        self.config = read_config(settings.config, settings.cfg_options)
        self.files = find_images(self.config, settings.images)
        self.checkpoint = files.converted_checkpoint(out, settings.config)
        self.progress = files.Progress(
            out,
            dict(
                settings._asdict(), model=self.config.model, files=self.files,
                pipeline=self.config.test_dataloader.dataset.pipeline,
                written=Path(settings.checkpoint).stat().st_mtime_ns,
            ),
        )  # fmt: skip
        self._tradeoff = None
        self.conversion: Optional[Conversion] = None

    @property
    def is_made(self) -> bool:
        """Whether these settings have already written the checkpoint.

        Raises:
            ValueError: Other settings have written it.
        """
        report = self._out / 'report.json'
        if not (self.checkpoint.is_file() and report.is_file()):
            return False
        if json.loads(report.read_text()).get('settings') != self.progress.key:
            raise ValueError(
                f'{self._out} holds {self.checkpoint.name}, which was converted with other settings; name '
                'another folder, or remove it'
            )
        return True

    def load(self) -> None:
        """Load the detector.

        Raises:
            ValueError: The checkpoint is not the config's, a setting is out of its range, or the budget needs
                labels and there are none.
        """
        settings = self.settings
        self.model = load_detector(self.config, settings.checkpoint, settings.device)
        self.choices = choose_detectors_layers(
            self.model,
            settings.parts,
            settings.heads,
            settings.kernel_size,
            settings.static,
            settings.expansion,
        )
        self.stages = stages_of(self.model)
        if self.budget and self.budget.kind == 'ap':
            _ = self._labelled  # if there are no labels, told before any work

    def load_images(self) -> Optional[str]:
        """Load the images, and see which layers they reach.

        Returns:
            A warning if they are few.
        """
        settings = self.settings
        self.images = load_images(
            self.model, self.config, self.files, settings.num_images, settings.seed
        )
        self._watch()
        self._out.mkdir(parents=True, exist_ok=True)
        enough = images_needed(
            {name: (each, self.model.get_submodule(name)) for name, each in self.calls.items()}
        )
        if len(self.images) >= enough:
            return None
        height, width = self.images.shape[2:]
        return (
            f'{len(self.images)} images of {height} x {width} pixels are few for the deepest layers: from '
            f'{enough} on, these have as many pixels as weights to fit; take more or larger ones if AP falls'
        )

    def plan(self, tell: Callable[..., None]) -> None:
        """Choose the layers within the budget.

        Args:
            tell: Called with the number of layers that are measured, and perhaps a text.

        Raises:
            ValueError: No set of layers meets it; says what can be had.
        """
        budget, settings = self.budget, self.settings

        def measure() -> list:
            layers, total = find_offers(
                budget.kind, self.model, self.choices, self.stages, self.images, self.calls,
                settings.seed, tell,
            )  # fmt: skip
            return [{name: list(offer) for name, offer in layers.items()}, total]

        layers, total = self.progress.once('offers', measure)
        offers = Offers({name: Offer(*offer) for name, offer in layers.items()}, total)
        tried: Dict[str, float] = {}

        def measure_set(names: List[str]) -> float:
            text = ','.join(names)
            tell(len(offers.layers), f'Trying {len(names)} layers')
            choices = choices_within(budget, self.choices, offers, names)
            if budget.kind == 'time':
                return self.progress.once(text, lambda: self._share_of_time(choices))
            tried[text] = self.progress.once(
                text, lambda: self._labelled.ap(self._convert(choices).model) - self._ap_before
            )
            return tried[text]

        chosen = spend(budget, offers, measure_set)
        self.choices = choices_within(budget, self.choices, offers, chosen)
        self._tradeoff = describe_tradeoff(budget, offers, chosen, tried, self.model)
        self._watch()

    def convert(self, tell: Callable[[str], None]) -> None:
        """Convert the layers, but for those that an interrupted conversion has left.

        Args:
            tell: Called with the name of a layer before and after it is fitted.
        """

        def note(name, fitted, layer):
            if fitted is not None:
                self.progress.add(name, layer, fitted)
            tell(name)

        before = dict(self.progress.fits)
        self.conversion = self._convert(self.choices, dict(self.progress.layers), note)
        for name, numbers in before.items():
            self.conversion.fitted[name] = self.conversion.fitted[name]._replace(**numbers)

    def write(self) -> dict:
        """Write config and checkpoint, and measure both detectors.

        Returns:
            The report.
        """
        files.write_student(
            self.checkpoint, self.settings.config, self.config, self.conversion,
            changed=bool(self.settings.cfg_options),
        )  # fmt: skip
        report = make_report(
            self.progress.key, self.model, self.conversion, self.stages, self.images, self.calls,
            self._measure_ap(), self._tradeoff,
        )  # fmt: skip
        self.progress.remove()
        return report

    def _watch(self) -> None:
        self.calls = watch_calls(self.model, _chosen(self.choices), self.stages, self.images[:1])

    def _share_of_time(self, choices: Mapping[str, Choice]) -> float:
        # Random weights: they hardly matter to the time.
        student = copy.deepcopy(self.model)
        replace_convolutions(student, {name: choices[name].attn_cfg for name in _chosen(choices)})
        student.to(self.images.device).eval()
        return share_of_time(self.model, student, self.stages, self.images[:1])

    def _convert(
        self, choices: Mapping[str, Choice], done=None, tell=lambda *_: None
    ) -> Conversion:
        if self.budget and not _chosen(choices):  # it is met by the detector as it is
            kept = {name: choice.reason for name, choice in choices.items()}
            return Conversion(copy.deepcopy(self.model), {}, {}, kept)
        return convert(
            self.model, self.images, stages=self.stages, choices=choices, seed=self.settings.seed,
            done=done, tell=tell,
        )  # fmt: skip

    @cached_property
    def _labelled(self) -> LabelledImages:
        if self.settings.num_val_images < 1:
            raise ValueError(
                f'num_val_images must be at least 1 to measure AP, but is {self.settings.num_val_images}'
            )
        return LabelledImages(self.config, self.settings.num_val_images)

    @cached_property
    def _ap_before(self) -> float:
        return self._labelled.ap(self.model)

    def _measure_ap(self) -> dict:
        try:
            return dict(
                images=len(self._labelled.indices),
                before=self._ap_before,
                after=self._labelled.ap(self.conversion.model),
            )
        except (OSError, ValueError) as error:
            return dict(missing=str(error))


def _chosen(choices: Mapping[str, Choice]) -> List[str]:
    return [name for name, choice in choices.items() if choice.attn_cfg is not None]
