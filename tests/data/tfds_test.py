from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import tensorflow_datasets as tfds

from distilljax.data import Loader, Tfds, labels_of, load_in_memory


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("tfds"))


def python(code, *args):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_digits_are_prepared_on_first_use_and_read_after_that(data_dir, capsys):
    source = Tfds("digits", "train", data_dir)()
    assert len(source) == 1200
    assert source.num_classes == 10
    assert source.class_names == tuple("0123456789")
    example = source[0]
    assert example["inputs"].shape == (8, 8, 1)
    assert example["inputs"].dtype == np.uint8
    assert example["inputs"].max() <= 16
    assert capsys.readouterr() == ("", "")  # two seconds need no progress bars
    assert len(Tfds("digits", "test", data_dir)()) == 400


def test_slices_are_those_of_tfds(data_dir):
    whole = load_in_memory(Tfds("digits", "train", data_dir)())
    part = load_in_memory(Tfds("digits", "train[100:120]", data_dir)())
    assert np.array_equal(part.inputs, whole.inputs[100:120])
    assert len(Tfds("digits", "train[:50%]+test", data_dir)()) == 1000


def test_an_empty_slice_is_an_error(data_dir):
    with pytest.raises(ValueError, match=r"at least one .*'train\[:0\]'.* are 1200"):
        Tfds("digits", "train[:0]", data_dir)()


def test_labels_are_those_of_the_examples(data_dir):
    source = Tfds("digits", "validation", data_dir)()
    labels = labels_of(source)
    assert labels.tolist() == [int(source[i]["labels"]) for i in range(len(source))]


def test_training_batches_equal_those_from_memory(data_dir):
    source = Tfds("digits", "train", data_dir)()
    read = Loader(36, scale=16.0, in_memory=False)(source, seed=0)
    loaded = Loader(36, scale=16.0)(load_in_memory(source), seed=0)
    for _ in range(40):
        a, b = next(read), next(loaded)
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[name], b[name]) for name in b)


def test_mocked_data_sets_of_tfds_work():
    with tfds.testing.mock_data(num_examples=9):
        source = Tfds("mnist", "train")()
        assert len(source) == 9
        assert source.num_classes == 10
        assert source[4]["inputs"].shape == (28, 28, 1)
        batch = next(Loader(4, scale=255.0)(source, seed=0))
        assert batch["inputs"].shape == (4, 28, 28, 1)
        assert batch["inputs"].max() <= 1.0


END_TO_END = """
    import sys
    from distilljax.data import Few, Loader, Tfds, RandomShift
    source = Few(Tfds("digits", "train", sys.argv[1]), 36, seed=0)()
    for in_memory in (True, False):
        loader = Loader(12, scale=16.0, augment=RandomShift(1), in_memory=in_memory)
        batch = next(loader(source, seed=0))
    print(batch["inputs"].shape, "tensorflow" in sys.modules)
"""


def test_tensorflow_is_never_imported(tmp_path):
    """Preparing, reading and training, offline, in a process of its own."""
    done = python(END_TO_END, str(tmp_path))
    output, errors = done.communicate()
    assert done.returncode == 0, errors
    assert output.split("\n")[0] == "(12, 8, 8, 1) False"


@pytest.mark.slow
def test_processes_that_prepare_at_once_do_not_disturb_each_other(tmp_path):
    code = """
        import sys
        from distilljax.data import Tfds, load_in_memory
        source = load_in_memory(Tfds("digits", "train", sys.argv[1])())
        print(len(source), int(source.inputs.sum()))
    """
    processes = [python(code, str(tmp_path)) for _ in range(3)]
    outputs = [process.communicate() for process in processes]
    assert [p.returncode for p in processes] == [0] * 3, outputs
    assert len({output for output, _ in outputs}) == 1
    folders = sorted(p.name for p in (tmp_path / "digits").iterdir())
    assert folders == [".prepare.lock", "1.0.0"]  # and nothing half done


def test_a_data_set_that_is_not_there_says_how_to_get_it(data_dir):
    with pytest.raises(ValueError, match=r"be prepared in array_record.*got mnist in"):
        Tfds("mnist", "train", data_dir)()


def test_an_unknown_data_set_is_an_error(data_dir):
    with pytest.raises(ValueError, match="that TFDS knows, got 'digit'"):
        Tfds("digit", "train", data_dir)()


def test_an_unknown_split_is_an_error_that_names_the_known_ones(data_dir):
    with pytest.raises(ValueError, match=r"\['test', 'train', 'validation'\].*'dev\["):
        Tfds("digits", "dev[:10]", data_dir)()


def test_an_unknown_feature_is_an_error_that_names_the_known_ones(data_dir):
    with pytest.raises(ValueError, match=r"\['id', 'image', 'label'\].*'pixels'"):
        Tfds("digits", "train", data_dir, inputs="pixels")()


def test_a_data_dir_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        ValueError, match="data_dir must be a folder that can be written"
    ):
        Tfds("digits", "train", str(tmp_path / "file"))()


def test_a_config_opens_nothing():
    assert Tfds("digits") == Tfds("digits")
    assert hash(Tfds("nothing", data_dir="/nowhere")) is not None
