"""Groups of images that stay on one side of the split."""

import hashlib
import logging as python_logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.images import write_images
from trainer.config import Config
from trainer.data import groups, splits
from trainer.data.dataset import Examples, read_folder
from trainer.errors import UserError


def make_examples(paths: list[str], contents: list[str] | None = None) -> Examples:
    """Examples with those paths; the class is the first folder, and the contents differ if they are not given."""
    classes = sorted({path.split("/")[0] for path in paths})
    labels = [classes.index(path.split("/")[0]) for path in paths]
    contents = contents or [hashlib.md5(path.encode()).hexdigest() for path in paths]
    return Examples(np.array(paths, object), np.array(labels, np.int32), np.array(contents, object))


def scenes(num_scenes: int, frames: int, class_name: str = "road") -> list[str]:
    return [f"{class_name}/scene{scene:02d}_{frame}.jpg" for scene in range(num_scenes) for frame in range(frames)]


def names_by_side(examples: Examples, pattern: str) -> list[set[str]]:
    names = groups.names_in_paths(examples.paths, pattern)
    held_out = groups.hold_out(examples, names, 0.2)
    return [set(names[~held_out]), set(names[held_out])]


def test_no_scene_is_on_both_sides_and_one_more_frame_moves_nothing():
    paths = scenes(40, 6)
    training, validation = names_by_side(make_examples(paths), "scene[0-9]+")
    assert not training & validation
    assert len(validation) == 8  # of 40: 48 of 240 images are exactly a fifth
    for scene in range(0, 40, 3):
        more = make_examples([*paths, f"road/scene{scene:02d}_9.jpg"])
        assert names_by_side(more, "scene[0-9]+") == [training, validation]


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=40), st.integers(0, 10**6))
def test_the_fraction_is_exact_up_to_half_a_group(sizes, seed):
    paths = [f"a/{seed}_{number}_{i}.jpg" for number, size in enumerate(sizes) for i in range(size)]
    examples = make_examples(paths)
    held_out = groups.hold_out(examples, groups.names_in_paths(examples.paths, "/([0-9]+_[0-9]+)_"), 0.2)
    assert 1 <= held_out.sum() < len(paths)
    if min(sizes) <= 2 * round(0.2 * len(paths)):
        assert abs(held_out.sum() - max(1, round(0.2 * len(paths)))) <= max(sizes) / 2 + 0.5


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 12), st.integers(0, 60)), min_size=5, max_size=120))
def test_groups_and_equal_contents_of_a_class_are_never_torn(images):
    paths = [f"{label}/{group}_{i}.jpg" for i, (label, group, _) in enumerate(images)]
    examples = make_examples(paths, [f"{content:032x}" for _, _, content in images])
    pattern = "/([1-9][0-9]*)_"  # 0 is no name
    if not any(group for _, group, _ in images):
        return
    names = groups.names_in_paths(examples.paths, pattern)
    held_out = groups.hold_out(examples, names, 0.2)
    for side in (names, examples.labels.astype(str).astype(object) + examples.hashes):
        assert not (set(side[held_out]) & set(side[~held_out])) - {""}
    assert (np.bincount(examples.labels[~held_out], minlength=3) > 0)[np.unique(examples.labels)].all()
    order = np.random.default_rng(0).permutation(len(paths))
    again = groups.hold_out(examples.take(order), names[order], 0.2)
    assert set(examples.paths[order][again]) == set(examples.paths[held_out])


def test_scenes_that_show_several_classes_hold_out_a_fifth_of_each():
    rng = np.random.default_rng(1)
    paths = [
        f"{'abc'[label]}/scene{scene:03d}_{i}.jpg"
        for scene in range(100)
        for i, label in enumerate(rng.integers(3, size=8))
    ]
    examples = make_examples(paths)
    held_out = groups.hold_out(examples, groups.names_in_paths(examples.paths, "scene[0-9]+"), 0.2)
    shares = np.bincount(examples.labels[held_out]) / np.bincount(examples.labels)
    assert np.all(np.abs(shares - 0.2) < 0.04), shares  # a scene is 0.03 of a class


def test_few_large_groups_do_not_hold_out_twice_the_fraction():
    examples = make_examples(
        [f"{name}/camera{camera}_{i}.jpg" for name in "ab" for camera in range(5) for i in range(19 + camera)]
    )
    held_out = groups.hold_out(examples, groups.names_in_paths(examples.paths, "camera[0-9]"), 0.2)
    assert 38 <= held_out.sum() <= 46  # one of five cameras


def test_images_without_a_name_are_split_as_without_groups():
    rng = np.random.default_rng(0)
    examples = make_examples(
        [f"{name}/{i}.jpg" for name in "ab" for i in range(40)], [rng.bytes(16).hex() for _ in range(80)]
    )
    held_out = groups.hold_out(examples, np.full(80, "", object), 0.2)
    assert list(examples.paths[held_out]) == list(splits.split_by_content(examples, 0.2).validation.paths)


def test_paths_without_a_name_are_counted_and_none_at_all_is_refused(caplog):
    examples = make_examples([*scenes(4, 2), "road/other.jpg"])
    with caplog.at_level(python_logging.WARNING, "absl"):
        names = groups.names_in_paths(examples.paths, "scene([0-9]+)")
    assert names.tolist() == ["00", "00", "01", "01", "02", "02", "03", "03", ""]
    assert "matches nothing in 1 of 9 paths (the first: 'road/other.jpg')" in caplog.text
    with pytest.raises(UserError, match="--group_by=patient matches nothing in the paths"):
        groups.names_in_paths(examples.paths, "patient")


def test_similar_images_are_named_by_their_lowest_hash():
    examples = make_examples([f"a/{i}" for i in range(5)], ["c", "b", "e", "a", "d"])
    assert groups.names_of_similar(np.array([7, 7, 2, 7, 5]), examples).tolist() == ["a", "a", "", "a", ""]


def test_one_group_cannot_be_split():
    examples = make_examples(scenes(1, 9))
    with pytest.raises(UserError, match="No class has images of two groups"):
        splits.split_by_content(examples, 0.2, groups.names_in_paths(examples.paths, "scene"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"group_by": "scene("}, r"--group_by=scene\( is not a regular expression"),
        ({"group_by": "similar", "head_epochs": 0, "epochs": 1}, "--group_by=similar with --head_epochs=0"),
        ({"group_by": "scene", "split_file": "split.csv"}, "--split_file=split.csv is the split"),
    ],
)
def test_a_group_by_that_cannot_apply_is_refused(flags, message):
    with pytest.raises(UserError, match=message):
        Config(**flags)


def test_groups_are_refused_where_folders_are_the_split(tmp_path):
    write_images(tmp_path / "train", {"cat": 3, "dog": 3}, seed=1)
    write_images(tmp_path / "val", {"cat": 2, "dog": 1}, seed=2)
    with pytest.raises(UserError, match="the folders train/ and val/ are the split"):
        splits.choose(read_folder(str(tmp_path)), validation_split=0.2, split_file="", group_by="cat_00[0-9]")
