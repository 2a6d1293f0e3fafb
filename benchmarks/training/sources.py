"""The data sets, in the layouts that their authors publish them in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.training import binary_formats, image_folder, webvision
from benchmarks.training.options import Options
from benchmarks.training.samples import FileSamples, SyntheticSamples, TensorSamples
from benchmarks.training.transforms import for_training, for_validation

Samples = TensorSamples | FileSamples | SyntheticSamples

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STRING_DIGITS = 3  # so that there are 1000 classes
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist


@dataclass
class Data:
    """Training and validation samples with their published labels.

    ``mean`` and ``std`` of each channel standardise inputs scaled to [0, 1]; ``pairs`` names the data set in
    :data:`fused_losses.noise.PAIRS`. ``names`` says where a training sample comes from.
    """

    train: Samples
    validation: Samples
    num_classes: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    pairs: str | None = None
    names: Callable[[int], str] = field(default=str)
    labels_are_true: bool = True
    published: Tensor = field(init=False)  # training labels; those of ``train`` may be replaced

    def __post_init__(self) -> None:
        """Keeps the published labels."""
        self.published = self.train.target

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one sample, as the network gets it."""
        if isinstance(self.train, SyntheticSamples):
            return self.train.image_shape
        if isinstance(self.train, TensorSamples):
            return tuple(self.train.inputs.shape[1:])
        return (3,)  # any height and width


def load(options: Options) -> Data:
    """The data set that ``options.dataset`` names.

    Raises:
        SystemExit: the files are not where they should be, or not what they should be.
    """
    loaders: dict[str, Callable[[Options], Data]] = {
        "digits": _digits,
        "digit-strings": _digit_strings,
        "fashion-mnist": _fashion_mnist,
        "cifar10": _cifar,
        "cifar100": _cifar,
        "imagefolder": _image_folder,
        "webvision": _webvision,
        "synthetic": _synthetic,
    }
    data = loaders[options.dataset](options)
    adapt(data, options)
    return data


def adapt(data: Data, options: Options) -> None:
    """Gives training samples the seed and the augmentation of ``options``, which they may have been loaded without."""
    if not isinstance(data.train, SyntheticSamples):
        data.train.seed = options.seed
    if isinstance(data.train, TensorSamples):
        data.train.augment = options.augment == "crop-flip"


def _in_memory(
    options: Options, train: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor], num_classes: int
) -> Data:
    inputs, target = (part[: options.samples] for part in train)
    return Data(TensorSamples(inputs, target), TensorSamples(*validation), num_classes)


def _digit_halves(options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (N, H, W) in [0, 1] and labels of the training and the test digits: MNIST's, else scikit-learn's."""
    if options.data is not None:
        return tuple(  # type: ignore[return-value]
            part.float() / 255.0 if part.dim() == 3 else part
            for name in ("train", "t10k")
            for part in binary_formats.read_mnist(options.data, name)
        )
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, target = load_digits(return_X_y=True)
    parts = train_test_split(images / 16.0, target, test_size=0.3, stratify=target, random_state=0)
    train_x, test_x, train_y, test_y = map(torch.as_tensor, parts)
    return train_x.float().view(-1, 8, 8), train_y, test_x.float().view(-1, 8, 8), test_y


def _digits(options: Options) -> Data:
    train_x, train_y, test_x, test_y = _digit_halves(options)
    return _in_memory(options, (train_x[:, None], train_y), (test_x[:, None], test_y), 10)


def _digit_strings(options: Options) -> Data:
    """Three digits side by side, drawn at random from the digits of the same half: 1000 classes."""
    train_x, train_y, test_x, test_y = _digit_halves(options)
    generator = torch.Generator().manual_seed(0)  # the same strings for every seed of the training

    def strings(images: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
        drawn = torch.randint(len(labels), (count, STRING_DIGITS), generator=generator)
        values = labels[drawn] @ torch.tensor([100, 10, 1])
        return torch.cat(images[drawn].unbind(1), dim=2)[:, None], values

    train = strings(train_x, train_y, options.samples or 40_000)
    return _in_memory(options, train, strings(test_x, test_y, 5_000), 10**STRING_DIGITS)


def _fashion_mnist(options: Options) -> Data:
    folder = options.data or FASHION_MNIST
    if options.data is None and not folder.is_dir():
        raise SystemExit(
            "--dataset fashion-mnist needs --data, the folder of its four files, or Debian's package "
            f"dataset-fashion-mnist, which has them in {folder}"
        )
    (train_x, train_y), (test_x, test_y) = (binary_formats.read_mnist(folder, name) for name in ("train", "t10k"))
    data = _in_memory(options, (train_x[:, None], train_y), (test_x[:, None], test_y), 10)
    data.mean, data.std, data.pairs = (0.286,), (0.353,), "fashion-mnist"
    return data


def _cifar(options: Options) -> Data:
    classes = 10 if options.dataset == "cifar10" else 100
    train, test = (binary_formats.read_cifar(options.folder(), classes, part) for part in ("train", "test"))
    data = _in_memory(options, train, test, classes)
    data.mean, data.std, data.pairs = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616), options.dataset
    return data


def _photographs(options: Options, train: tuple[list[Path], Tensor], validation: tuple[list[Path], Tensor]) -> Data:
    size = options.image_size
    files = train[0]
    return Data(
        FileSamples(*train, for_training(size), size),
        FileSamples(*validation, for_validation(size), size),
        num_classes=1 + int(max(train[1].max(), validation[1].max())),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        names=lambda index: str(files[index]),
    )


def _image_folder(options: Options) -> Data:
    folder = options.folder()
    train, validation = folder / "train", folder / "val"
    for part in (train, validation):
        if not part.is_dir():
            raise SystemExit(f"--data must have folders train and val with one folder a class, {part} is missing")
    classes: dict[str, int] = {}
    halves = []
    for part in (train, validation):
        found = image_folder.read(part)
        classes = classes or {name: number for number, name in enumerate(found)}
        strange = sorted(found.keys() - classes.keys())
        if strange:
            raise SystemExit(f"{part} must have classes of {train}, got {', '.join(strange[:5])}")
        files = [path for paths in found.values() for path in paths]
        halves.append((files, torch.tensor([classes[name] for name, paths in found.items() for _ in paths])))
    data = _photographs(options, *halves)
    data.num_classes = len(classes)
    return data


def _webvision(options: Options) -> Data:
    lists = webvision.read(options.folder(), options.webvision_parts.split(","), options.classes)
    data = _photographs(options, lists.train, lists.validation)
    data.num_classes = options.classes or webvision.CLASSES
    data.names, data.labels_are_true = lists.describe, False
    return data


def _synthetic(options: Options) -> Data:
    samples = SyntheticSamples(options.samples or 100_000, options.classes or 1000)
    return Data(samples, SyntheticSamples(options.batch_size, options.classes or 1000), options.classes or 1000)
