"""Published stereo data sets, in the folders that their archives unpack to.

They are listed here by name, pair by pair. torchvision's classes for the same sets pair files by their order, join
FlyingThings3D's training and test parts, and give KITTI 2015's images the truth of other frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from .stereo import StereoFiles, StereoPairs, StereoTransform, match_files

__all__ = ["Kitti2012", "Kitti2015", "Middlebury2014", "SceneFlow"]

Subset = Literal["FlyingThings3D", "Monkaa", "Driving"]

# Folders of a scene below those of images and of disparities.
_SCENES = {"FlyingThings3D": "{split}/*/*", "Monkaa": "*", "Driving": "*/*/*"}
# Images and disparities of each subset: as in RAFT-Stereo and torchvision, and as in PSMNet.
_LAYOUTS = (
    {name: (f"{name}/frames_{{render}}", f"{name}/disparity") for name in _SCENES},
    {
        "FlyingThings3D": ("frames_{render}", "frames_disparity"),
        "Monkaa": ("monkaa_frames_{render}", "monkaa_disparity"),
        "Driving": ("driving_frames_{render}", "driving_disparity"),
    },
)


class SceneFlow(StereoPairs):
    """Scene Flow: 35,454 rendered pairs of 540 x 960 to train on and 4,370 to test on, all disparities known.

    ::

        FlyingThings3D/frames_cleanpass/{TRAIN,TEST}/A/0000/{left,right}/0006.png   or   frames_cleanpass/...
        FlyingThings3D/disparity/{TRAIN,TEST}/A/0000/left/0006.pfm                  or   frames_disparity/...
        Monkaa/{frames_cleanpass,disparity}/<scene>/...                             or   monkaa_{...}/<scene>/...
        Driving/{frames_cleanpass,disparity}/15mm_focallength/<scene>/fast/...      or   driving_{...}/...

    Of a subset that is there in both ways, the former is taken. Disparities are read without their sign, which differs
    between releases.

    Args:
        root: the folder that holds the above.
        split: ``"train"``: FlyingThings3D's TRAIN and all of the others; ``"test"``: FlyingThings3D's TEST, as the
            others have no such part.
        pass_name: ``"clean"``, or ``"final"``, with blur and depth of field.
        subsets: which to take.
        transform: see :class:`StereoPairs`.

    Raises:
        FileNotFoundError: a folder or a file of a pair is missing; the message shows the folders above.
        ValueError: an unknown name, no subset that has the split, or files that do not fit together.

    Paper: Shen et al. 2021, Sec. 4.2; Mayer et al. 2016 (arXiv 1512.02134).
    """

    def __init__(
        self,
        root: str | Path,
        split: Literal["train", "test"] = "train",
        pass_name: Literal["clean", "final"] = "clean",
        subsets: Sequence[Subset] = ("FlyingThings3D", "Monkaa", "Driving"),
        *,
        transform: StereoTransform | None = None,
    ) -> None:
        _check("split", split, ("train", "test"))
        _check("pass_name", pass_name, ("clean", "final"))
        for subset in subsets:
            _check("subsets", subset, get_args(Subset))
        if split == "test":
            subsets = [subset for subset in subsets if subset == "FlyingThings3D"]
        if not subsets:
            raise ValueError(f"subsets must name one that has a {split} part; got none")
        self.split, self.pass_name, self.subsets = split, pass_name, tuple(subsets)
        files = [
            file
            for subset in self.subsets
            for file in _scene_flow(Path(root), subset, split.upper(), f"{pass_name}pass")
        ]
        super().__init__(files, absolute=True, transform=transform)


def _scene_flow(root: Path, subset: str, split: str, render: str) -> list[StereoFiles]:
    scenes = _SCENES[subset].format(split=split)
    ways = [
        (images.format(render=render), truth) for images, truth in (w[subset] for w in _LAYOUTS)
    ]
    images, truth = next((way for way in ways if (root / way[0]).is_dir()), ways[0])
    layout = "\nor\n".join(
        f"  {root}/{images}/{scenes}/left/*.png\n"
        f"  {root}/{images}/{scenes}/right/*.png\n"
        f"  {root}/{truth}/{scenes}/left/*.pfm"
        for images, truth in ways
    )
    return match_files(
        root / images / scenes / "left/*.png",
        root / images / scenes / "right/*.png",
        root / truth / scenes / "left/*.pfm",
        prefix=f"{subset}/" + (f"{split}/" if split in scenes else ""),
        layout=layout,
    )


class Kitti2012(StereoPairs):
    """KITTI 2012: 194 pairs of about 375 x 1242 with sparse truth from a laser, and 195 without, in colour.

    ::

        training/{colored_0,colored_1}/000000_10.png     testing/{colored_0,colored_1}/000000_10.png
        training/{disp_occ,disp_noc}/000000_10.png

    Args:
        root: the folder that holds ``training`` and ``testing``.
        split: ``"train"``, or ``"test"``, which has no truth.
        occluded: whether points that the right camera does not see are valid too (``disp_occ``) or not (``disp_noc``).
        transform: see :class:`StereoPairs`.

    Raises:
        FileNotFoundError: a folder or a file of a pair is missing; the message shows the folders.
        ValueError: an unknown split, or files that do not fit together.
    """

    def __init__(
        self,
        root: str | Path,
        split: Literal["train", "test"] = "train",
        *,
        occluded: bool = True,
        transform: StereoTransform | None = None,
    ) -> None:
        truth = "disp_occ" if occluded else "disp_noc"
        files = _kitti(Path(root), split, ("colored_0", "colored_1", truth))
        super().__init__(files, transform=transform)


class Kitti2015(StereoPairs):
    """KITTI 2015: 200 pairs of about 375 x 1242 with sparse truth from a laser, and 200 without.

    ::

        training/{image_2,image_3}/000000_10.png         testing/{image_2,image_3}/000000_10.png
        training/{disp_occ_0,disp_noc_0}/000000_10.png

    The second frames, ``_11.png``, have no truth in the left image's coordinates and are left out.

    Args:
        root: the folder that holds ``training`` and ``testing``.
        split: ``"train"``, or ``"test"``, which has no truth.
        occluded: whether points that the right camera does not see are valid too (``disp_occ_0``) or not
            (``disp_noc_0``).
        transform: see :class:`StereoPairs`.

    Raises:
        FileNotFoundError: a folder or a file of a pair is missing; the message shows the folders.
        ValueError: an unknown split, or files that do not fit together.
    """

    def __init__(
        self,
        root: str | Path,
        split: Literal["train", "test"] = "train",
        *,
        occluded: bool = True,
        transform: StereoTransform | None = None,
    ) -> None:
        truth = "disp_occ_0" if occluded else "disp_noc_0"
        files = _kitti(Path(root), split, ("image_2", "image_3", truth))
        super().__init__(files, transform=transform)


def _kitti(root: Path, split: str, folders: tuple[str, str, str]) -> list[StereoFiles]:
    _check("split", split, ("train", "test"))
    used = folders if split == "train" else folders[:2]
    patterns = [root / f"{split}ing" / folder / "*_10.png" for folder in used]
    return match_files(*patterns, layout="\n".join(f"  {pattern}" for pattern in patterns))


class Middlebury2014(StereoPairs):
    """Middlebury 2014: 23 indoor scenes of 1.5 to 6 million pixels with dense truth.

    ::

        <scene>-perfect/{im0.png,im1.png,disp0.pfm}
        <scene>-imperfect/{im0.png,im1.png,disp0.pfm}

    The same scenes at a half or a quarter of the size, as the benchmark's third version has them, are a
    :class:`StereoFolder` of ``trainingH/*/im0.png``, ``trainingH/*/im1.png`` and ``trainingH/*/disp0GT.pfm``.

    Args:
        root: the folder that holds the scenes.
        calibration: ``"perfect"``, or ``"imperfect"``, with the vertical errors of an ordinary calibration.
        transform: see :class:`StereoPairs`.

    Raises:
        FileNotFoundError: there is no scene, or a file of one is missing.
        ValueError: an unknown calibration, or files that do not fit together.
    """

    def __init__(
        self,
        root: str | Path,
        calibration: Literal["perfect", "imperfect"] = "perfect",
        *,
        transform: StereoTransform | None = None,
    ) -> None:
        _check("calibration", calibration, ("perfect", "imperfect"))
        names = ("im0.png", "im1.png", "disp0.pfm")
        patterns = [Path(root) / f"*-{calibration}" / name for name in names]
        layout = "\n".join(f"  {pattern}" for pattern in patterns)
        super().__init__(match_files(*patterns, layout=layout), transform=transform)


def _check(argument: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{argument} must be among {known}; got {value!r}")
