"""Data sets of Hugging Face `datasets`: a folder that it wrote, a folder that it reads, a name."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vitx.data.folders import Labelled, order, split_names
from vitx.data.images import BadImage, Encoded, Files
from vitx.registry import UserError, nearest

PICTURE_COLUMNS = ("image", "img", "picture")
"""Columns of encoded pictures without a type of their own are looked for by these names."""
LABEL_COLUMNS = ("label", "labels", "class", "target")
"""Columns of labels that are words or numbers are looked for by these names."""


def read(
    root: str, *, max_pixels: int, image: str = "", label: str = "", config: str = ""
) -> tuple[dict[str, Labelled], list[str]]:
    """The splits, and what is to be said of them.

    A split whose labels are all -1 or absent is hidden and left out. Raises UserError where the
    data can't be read, a column can't be told, or a label is none of the classes.
    """
    loaded, notes = _load(root, config), list[str]()
    splits = dict[str, Labelled]()
    parts = {ours: loaded[theirs] for ours, theirs in split_names(loaded, root).items()}
    if "train" not in parts:
        raise UserError(f"{root} has no split named train; it has {', '.join(loaded)}")
    features = parts["train"].features
    pictures, labels = _picture_column(features, image), _label_column(features, label)
    mode = getattr(features[pictures], "mode", None) or ""
    for name, part in parts.items():
        where = f"{root} {name}"
        for column in (pictures, labels):
            if column not in part.features:
                raise UserError(
                    f"{where} has no column {column!r}; {nearest(column, part.features)}"
                )
        if not len(part):
            raise UserError(f"{where} has no rows")
        numbers, classes = _labels(part, labels, where)
        if name != "train" and all(number < 0 for number in numbers):
            notes.append(f"{where}: its {len(numbers):,} labels are hidden; it is left out")
            continue
        if min(numbers, default=0) < 0:
            row = next(row for row, number in enumerate(numbers) if number < 0)
            raise UserError(
                f"{where}, row {row}: the label {part[row][labels]} is none of {len(classes)} "
                "classes"
            )
        find = partial(_row, part=_encoded(part, pictures, where), column=pictures, where=where)
        files = Files(range(len(part)), torch.tensor(numbers), find, max_pixels, mode)
        splits[name] = Labelled(files, classes)
    return splits, notes


def _load(root: str, config: str) -> Mapping[str, Any]:
    """What datasets gives, by its names of splits."""
    if not root:
        raise UserError("data.root is empty; hf needs a name on the hub or a folder")
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise UserError("data.name = 'hf' needs datasets: pip install -e '.[hf]'") from error
    except Exception as error:  # another version of what it imports: of any class
        raise UserError(f"datasets can't be imported: {_sentence(error)}") from error
    saved = Path(root, "dataset_dict.json").exists() or Path(root, "state.json").exists()
    try:
        if saved:
            loaded: Any = datasets.load_from_disk(root)
        else:
            loaded = datasets.load_dataset(root, config or None)
    except Exception as error:  # of its readers, of any class
        hint = ""
        if isinstance(error, ValueError) and "Config name is missing" in str(error):
            hint = "; name it with hf(config='…')"
        raise UserError(
            f"data.root = {root!r} can't be read by datasets: {_sentence(error)}{hint}"
        ) from error
    return loaded if isinstance(loaded, dict) else {"train": loaded}


def _sentence(error: BaseException) -> str:
    """An error of another library in one line, with its cause."""
    words = " ".join(str(error).split()) or type(error).__name__
    cause = error.__cause__
    return f"{words} ({_sentence(cause)})" if cause is not None and str(cause) else words


def _picture_column(features: Mapping[str, Any], named: str) -> str:
    """The column of pictures: of Image values, else of files as bytes."""
    import datasets

    if named:
        return _known(named, features, "image")
    for columns in (
        [name for name, feature in features.items() if isinstance(feature, datasets.Image)],
        [name for name in features if name in PICTURE_COLUMNS],
    ):
        if len(columns) == 1:
            return columns[0]
        if columns:
            raise UserError(
                f"hf: {', '.join(columns)} are columns of pictures; name one with hf(image='…')"
            )
    raise UserError(f"hf: no column holds pictures ({', '.join(features)})")


def _label_column(features: Mapping[str, Any], named: str) -> str:
    """The column of labels: of ClassLabel values, else one named like labels."""
    import datasets

    if named:
        return _known(named, features, "label")
    for columns in (
        [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)],
        [name for name in features if name in LABEL_COLUMNS],
    ):
        if len(columns) == 1:
            return columns[0]
        if columns:
            raise UserError(
                f"hf: {', '.join(columns)} are columns of labels; name one with hf(label='…')"
            )
    raise UserError(
        f"hf: no column holds class labels ({', '.join(features)}); name one with hf(label='…')"
    )


def _known(named: str, features: Mapping[str, Any], what: str) -> str:
    if named not in features:
        raise UserError(f"hf: {what} = {named!r} is no column; {nearest(named, features)}")
    return named


def _labels(part: Any, column: str, where: str) -> tuple[list[int], tuple[str, ...]]:
    """Class numbers, -1 where there is none, and the names of the classes.

    Words and numbers are classes in their order, whole numbers by their value.
    """
    import datasets

    feature, values = part.features[column], part[column][:]
    if isinstance(feature, datasets.ClassLabel):
        names = tuple(feature.names)
        return [v if v in range(len(names)) else -1 for v in values], names
    kind = getattr(feature, "dtype", "")
    if kind not in ("string", "large_string", "bool") and "int" not in kind:
        raise UserError(
            f"{where}: column {column!r} holds {kind or type(feature).__name__} values; classes "
            "are ClassLabel values, words or whole numbers (class_encode_column makes them)"
        )
    hidden = {None, -1} if "int" in kind else {None, ""}
    classes = sorted({value for value in values if value not in hidden}, key=order)
    if len(classes) > max(1000, len(values) // 2):
        raise UserError(f"{where}: column {column!r} holds {len(classes):,} different values")
    numbers = {value: number for number, value in enumerate(classes)}
    return [numbers.get(value, -1) for value in values], tuple(map(str, classes))


def _encoded(part: Any, column: str, where: str) -> Any:
    """The part with pictures as they are stored: a file's path, or its bytes."""
    import datasets

    try:
        return part.cast_column(column, datasets.Image()).cast_column(
            column, datasets.Image(decode=False)
        )
    except Exception as error:  # of pyarrow, of any class
        raise UserError(
            f"{where}: column {column!r} holds no pictures: {_sentence(error)}"
        ) from error


def _row(row: int, *, part: Any, column: str, where: str) -> Encoded:
    name = f"{where}, row {row}"
    stored = part[row][column]
    if stored is None or (stored["bytes"] is None and stored["path"] is None):
        raise BadImage(f"{name} has no picture")
    source = Path(stored["path"]) if stored["bytes"] is None else stored["bytes"]
    return Encoded(source, name)
