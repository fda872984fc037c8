"""Data: readers against known pixels, the cache, splits, each kind of bad input."""

import hashlib
import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image
from test_files import full_disk

import data
from data import Normalization, Split
from errors import UserError
from vision import import_torchvision


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def cifar_archive(monkeypatch):
    """Makes a small archive in CIFAR's own format. torchvision then checks it against the sums of this archive."""

    def make(name: str, root: Path) -> dict[str, np.ndarray]:
        datasets = import_torchvision("torchvision.datasets")
        kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
        classes, random = int(name.removeprefix("cifar")), np.random.default_rng(0)
        label_key, names_key = {10: (b"labels", "label_names"), 100: (b"fine_labels", "fine_label_names")}[classes]
        parts, contents = {"train": [], "test": []}, {}
        for part, files in (("train", kind.train_list), ("test", kind.test_list)):
            for file, _ in files:
                pixels = random.integers(0, 256, (classes, 3072), dtype=np.uint8)
                labels = random.permutation(classes).tolist()
                batch = {b"data": pixels, label_key: labels}
                if classes == 100:
                    batch[b"coarse_labels"] = [label // 5 for label in labels]
                contents[file] = pickle.dumps({k.decode(): v for k, v in batch.items()})
                parts[part].append((pixels, labels))
        meta = {names_key: [f"thing{i}" for i in range(classes)]}
        if classes == 100:
            meta["coarse_label_names"] = [f"group{i}" for i in range(20)]
        contents[kind.meta["filename"]] = pickle.dumps(meta)
        root.mkdir(exist_ok=True)
        with tarfile.open(root / kind.filename, "w:gz") as archive:
            for file, content in contents.items():
                member = tarfile.TarInfo(f"{kind.base_folder}/{file}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        monkeypatch.setattr(kind, "tgz_md5", md5((root / kind.filename).read_bytes()))
        monkeypatch.setattr(kind, "url", f"http://127.0.0.1:9/{kind.filename}")  # no one answers there
        for attribute in ("train_list", "test_list"):
            monkeypatch.setattr(kind, attribute, [[f, md5(contents[f])] for f, _ in getattr(kind, attribute)])
        monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(contents[kind.meta["filename"]])})
        return {
            part: (
                np.concatenate([p for p, _ in lists]).reshape(-1, 3, 32, 32),
                [label for _, labels in lists for label in labels],
            )
            for part, lists in parts.items()
        }

    return make


# --------------------------------------------------------------------------------------------------------- readers


@pytest.mark.parametrize("name, batches", [("cifar10", 5), ("cifar100", 1)])
def test_cifar_archives_are_read_as_they_are(tmp_path, cifar_archive, name, batches):
    expected = cifar_archive(name, tmp_path)
    classes = int(name.removeprefix("cifar"))
    for _ in range(2):  # from the archive, then from the cache
        loaded = data.load(name, tmp_path)
        assert loaded.classes == tuple(f"thing{i}" for i in range(classes))
        for part, split in (("train", loaded.train), ("test", loaded.test)):
            assert np.array_equal(split.images.numpy(), expected[part][0])
            assert split.labels.tolist() == expected[part][1]
        assert len(loaded.train) == batches * classes and len(loaded.test) == classes


def test_cifar100_trains_through_the_command_line(tmp_path, cifar_archive, run_main):
    import train

    cifar_archive("cifar100", tmp_path / "data")
    line = f"--dataset cifar100 --data-dir {tmp_path}/data --width_mult 0.1 --epochs 1 --batch-size 50"
    code, out, err = run_main(train, *line.split(), "--save_path", tmp_path / "c100.pth", "--progressive_sizes", 8)
    assert (code, err) == (0, "")
    import checkpoint

    saved = checkpoint.load(tmp_path / "c100.pth")
    assert (saved.architecture.num_classes, saved.dataset, saved.classes[99]) == (100, "cifar100", "thing99")


def test_a_half_downloaded_archive_without_network_is_one_line(tmp_path, cifar_archive):
    cifar_archive("cifar10", tmp_path)
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(archive.read_bytes()[:1000])
    with pytest.raises(
        UserError, match=r"cannot get cifar10 .*gz has a wrong MD5: .*put the whole cifar-10-python.tar.gz \(MD5"
    ):
        data.load("cifar10", tmp_path)


def test_folders_are_read_and_resized(tmp_path):
    pixels = write_images(tmp_path, classes=2, train=3, test=2)
    large = np.full((100, 80), 77, dtype=np.uint8)  # a grey image of another size
    Image.fromarray(large).save(tmp_path / "test" / "class1" / "zz.png")
    (tmp_path / "test" / "class1" / ".hidden").write_text("not an image")
    loaded = data.load("folder", tmp_path)
    assert loaded.classes == ("class0", "class1")
    assert loaded.train.labels.tolist() == [0, 0, 0, 1, 1, 1] and loaded.test.labels.tolist() == [0, 0, 1, 1, 1]
    assert loaded.train.images.shape == (6, 3, 32, 32) and loaded.train.images.dtype == torch.uint8
    expected = pixels["train/class1/002.png"].transpose(2, 0, 1)
    assert np.array_equal(loaded.train.images[5].numpy(), expected)
    assert (loaded.test.images[4] == 77).all()


@pytest.mark.parametrize(("name", "dtype"), [("a.png", np.uint16), ("a.tiff", np.uint16), ("a.tiff", np.int32)])
def test_grey_of_16_bits_keeps_its_shades(tmp_path, name, dtype):
    shades = np.arange(1024).reshape(32, 32) % 256
    Image.fromarray((shades * 257).astype(dtype)).save(tmp_path / name)
    assert np.array_equal(data.read_image(tmp_path / name), np.stack([shades] * 3, axis=-1))


def test_pillows_warnings_are_not_the_users(tmp_path, recwarn):
    image = Image.new("P", (32, 32))
    image.putpalette([1, 2, 3, 4, 5, 6])
    image.save(tmp_path / "a.png", transparency=b"\x00\x80")
    assert (data.read_image(tmp_path / "a.png") == (1, 2, 3)).all() and not len(recwarn)


def test_names_that_are_not_utf8_are_read(tmp_path):
    write_images(tmp_path, classes=2, train=2, test=1)
    os.rename(os.fsencode(tmp_path) + b"/train/class0/001.png", os.fsencode(tmp_path) + b"/train/class0/\xe4.png")
    assert len(data.load("folder", tmp_path).train) == 4
    (tmp_path / "train" / "class0" / "000.png").unlink()
    assert len(data.load("folder", tmp_path).train) == 3  # read anew: the cache knows the names


def test_a_place_without_a_data_set_says_what_was_looked_for(tmp_path, monkeypatch, cifar_archive):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--data-dir .*file is a file"):
        data.load("digits", tmp_path / "file")
    with pytest.raises(UserError, match="File name too long"):
        data.load("cifar10", tmp_path / ("x" * 300))
    cifar_archive("cifar10", tmp_path / "elsewhere")  # from here on no one answers to a download
    with pytest.raises(UserError, match="cannot get cifar10 .*your own images would go in .*mistyped/train"):
        data.load("cifar10", tmp_path / "mistyped")
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "file"]


def test_digits_are_scikit_learns(tmp_path):
    from sklearn.datasets import load_digits

    loaded = data.load("digits", tmp_path)
    assert (len(loaded.train), len(loaded.test), len(loaded.classes)) == (1438, 359, 10)
    both = torch.cat([loaded.train.labels, loaded.test.labels])
    assert torch.equal(both.bincount(), torch.from_numpy(load_digits().target).bincount())
    shares = loaded.test.labels.bincount() / both.bincount()
    assert (shares - 0.2).abs().max() < 0.004
    sources = torch.from_numpy(load_digits().images)
    means = loaded.train.images.float().mean((1, 2, 3)) / 255 * 16
    assert abs(means.mean() - sources.mean()) < 0.05
    assert torch.equal(loaded.train.images[:, 0], loaded.train.images[:, 2])


def break_text(root: Path) -> None:
    (root / "train" / "class1" / "notes.txt").write_text("hello")


def break_jpeg(root: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "JPEG")
    (root / "train" / "class1" / "half.jpg").write_bytes(buffer.getvalue()[:600])


def break_png(root: Path) -> None:
    path = root / "test" / "class1" / "000.png"
    path.write_bytes(path.read_bytes()[:100] + b"\0" * 200)


def break_link(root: Path) -> None:
    (root / "test" / "class0" / "gone.png").symlink_to(root / "nowhere")


def break_pipe(root: Path) -> None:
    os.mkfifo(root / "test" / "class0" / "pipe.png")


def break_class(root: Path) -> None:
    for path in (root / "test" / "class1").iterdir():
        path.unlink()
    (root / "test" / "class1").rmdir()


def break_empty(root: Path) -> None:
    for path in (root / "train" / "class0").iterdir():
        path.unlink()


def break_test(root: Path) -> None:
    (root / "test").rename(root / "tests")


def break_float(root: Path) -> None:
    Image.fromarray(np.zeros((32, 32), np.float32)).save(root / "train" / "class1" / "float.tiff")


def break_circle(root: Path) -> None:
    (root / "train" / "class1" / "circle.png").symlink_to("circle.png")


@pytest.mark.parametrize(
    "damage, message",
    [
        (break_text, "notes.txt is not a readable image"),
        (break_jpeg, "half.jpg is not a readable image"),
        (break_png, "000.png is not a readable image"),
        (break_link, "gone.png is not a readable image"),
        (break_pipe, "pipe.png is not a readable image .it is a device or a pipe"),
        (break_class, "test has no folder for class 'class1'"),
        (break_empty, "class0 is empty"),
        (break_test, "test is missing"),
        (break_float, "float.tiff is not a readable image .*floating-point"),
        (break_circle, "cannot read .*circle.png .Too many levels"),
    ],
)
def test_bad_folders_are_one_line_that_names_the_file(tmp_path, damage, message):
    write_images(tmp_path, classes=3, train=2, test=2)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        data.load("folder", tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_the_default_data_set_is_the_folder_if_there_is_one(tmp_path, image_folder):
    assert data.default_name(image_folder) == "folder"
    assert data.default_name(tmp_path) == "cifar10"
    with pytest.raises(UserError, match="--dataset is 'mnist'; expected one of cifar10, "):
        data.load("mnist", tmp_path)


def test_the_shared_cifar10(real_images):
    folder, counts = real_images
    assert len(counts) == 20 and all(count == {"train": 5000, "test": 1000}[p] for (p, _), count in counts.items())
    loaded = data.load("folder", folder)
    assert len(loaded.train) == len(loaded.test) == 200
    assert loaded.classes[0] == "airplane" and loaded.classes[9] == "truck"
    airplane, truck = loaded.train.images[0].float(), loaded.test.images[199].float()
    assert torch.allclose(
        airplane.mean((1, 2)), torch.tensor([148.18, 148.70, 148.85]), atol=1
    )  # decoders differ by rounding
    assert torch.allclose(truck.mean((1, 2)), torch.tensor([111.08, 100.03, 95.46]), atol=1)


# ------------------------------------------------------------------------------------------------------- the cache


def test_the_cache_is_rebuilt_when_its_source_changes(tmp_path):
    write_images(tmp_path, classes=2, train=2, test=1)
    first = data.load("folder", tmp_path)
    cache = tmp_path / "folder-32x32.safetensors"
    written = cache.stat().st_mtime_ns
    assert torch.equal(data.load("folder", tmp_path).train.images, first.train.images)
    assert cache.stat().st_mtime_ns == written
    Image.fromarray(np.full((32, 32, 3), 9, dtype=np.uint8)).save(tmp_path / "train" / "class0" / "001.png")
    assert (data.load("folder", tmp_path).train.images[1] == 9).all()
    for part in ("train", "test"):  # a new class, without an image so far
        (tmp_path / part / "class2").mkdir()
    with pytest.raises(UserError, match="class2 is empty"):
        data.load("folder", tmp_path)


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "empty"])
def test_a_damaged_cache_is_rebuilt(tmp_path, damage):
    write_images(tmp_path, classes=2, train=2, test=1)
    first = data.load("folder", tmp_path)
    cache = tmp_path / "folder-32x32.safetensors"
    whole = cache.read_bytes()
    fingerprint = data.source_fingerprint("folder", tmp_path)
    flipped = whole[:-1000] + bytes([whole[-1000] ^ 1]) + whole[-999:]
    cache.write_bytes({"cut": whole[:-7], "flipped": flipped, "foreign": b"hello" * 99, "empty": b""}[damage])
    assert data.read_cache(cache, "folder", fingerprint) is None
    assert torch.equal(data.load("folder", tmp_path).train.images, first.train.images)
    assert data.read_cache(cache, "folder", fingerprint) is not None


def test_a_cache_is_enough_without_its_source_and_none_is_needed(tmp_path):
    write_images(tmp_path, classes=2, train=2, test=1)

    with full_disk(1000):
        first = data.load("folder", tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    data.load("folder", tmp_path)
    for part in ("train", "test"):
        (tmp_path / part).rename(tmp_path / f"away-{part}")
    assert torch.equal(data.load("folder", tmp_path).train.images, first.train.images)


# ------------------------------------------------------------------------------------- splits, batches, augmentation


@pytest.mark.parametrize("held_out", [0, 1, 7, 50, 99])
def test_stratified_split_counts(held_out):
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)[
        torch.randperm(100, generator=torch.Generator().manual_seed(0))
    ]
    split = Split(torch.arange(100).view(-1, 1, 1, 1).expand(-1, 3, 1, 1), labels)
    rest, held = data.stratified_split(split, held_out, seed=1)
    assert len(held) == held_out and len(rest) == 100 - held_out
    numbers = torch.cat([rest.images[:, 0, 0, 0], held.images[:, 0, 0, 0]])
    assert sorted(numbers.tolist()) == list(range(100))
    for label, share in enumerate((0.5, 0.3, 0.2)):
        assert abs(int((held.labels == label).sum()) - share * held_out) < 1
    again = data.stratified_split(split, held_out, seed=1)[1]
    assert torch.equal(held.images, again.images)
    if held_out == 50:
        assert not torch.equal(held.images, data.stratified_split(split, held_out, seed=2)[1].images)


@pytest.mark.parametrize(
    ("counts", "held_out", "taken"),
    [
        ((1, 1, 1, 30), 10, (0, 0, 0, 10)),  # their shares are 0.3 and 9.1 images
        ((1, 1, 1, 1, 1, 1, 4), 3, (0, 0, 0, 0, 0, 0, 3)),
        ((1, 1, 1), 2, (1, 1, 0)),  # there is no other way
    ],
)
def test_the_last_image_of_a_class_is_trained_on(counts, held_out, taken):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    held = data.stratified_split(Split(torch.zeros(len(labels), 3, 1, 1), labels), held_out, seed=0)[1]
    assert tuple(held.labels.bincount(minlength=len(counts)).tolist()) == taken


def test_plenty_of_images_are_split_as_ever():
    """The split of the checkpoint that comes along was drawn so: 5,000 of CIFAR-10's 50,000 training images."""
    labels = torch.arange(50_000) // 5000
    rest, held = data.stratified_split(Split(torch.arange(50_000).view(-1, 1, 1, 1), labels), 5000, seed=0)
    assert (data.split_checksum(rest), data.split_checksum(held)) == ("b240b12f", "6c57cade")


def test_a_split_as_large_as_the_set_is_refused():
    with pytest.raises(UserError, match="--val-size is 4; expected 0 to 3"):
        data.stratified_split(Split(torch.zeros(4, 3, 1, 1), torch.zeros(4, dtype=torch.int64)), 4, seed=0)


def test_calibration_images_are_drawn_from_the_training_images():
    train = Split(torch.arange(50).view(-1, 1, 1, 1), torch.arange(50))
    drawn = data.random_subset(train, 20, seed=3)
    assert len(set(drawn.labels.tolist())) == 20
    assert torch.equal(drawn.images.flatten(), drawn.labels)
    assert torch.equal(drawn.labels, data.random_subset(train, 20, seed=3).labels)
    assert len(data.random_subset(train, 999, seed=3)) == 50


def test_batches_are_all_images_in_order():
    split = Split(torch.arange(10).view(-1, 1, 1, 1), torch.arange(10))
    assert [batch.labels.tolist() for batch in data.batches(split, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_normalization_against_known_pixels():
    pixels = torch.tensor([125, 123, 114, 189, 59, 114], dtype=torch.uint8).view(2, 3, 1, 1)
    x = Normalization()(pixels)
    assert x.flatten().tolist() == [0, 0, 0, 1, -1, 0] and x.dtype == torch.float32
    large = torch.randint(0, 256, (2, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    y = Normalization((1, 2, 3), 7.0)(large)
    assert y.is_contiguous(memory_format=torch.channels_last)
    for c in range(3):
        assert torch.equal(y[:, c], (large[:, c].float() - (c + 1)) / 7.0)


def test_normalization_for_a_data_set_is_that_of_its_training_images():
    images = torch.randint(0, 256, (200, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)) // 2
    normal = data.normalization_for("folder", Split(images, torch.zeros(200)))
    assert normal.mean == tuple(round(float(images[:, c].float().mean())) for c in range(3))
    assert normal.std == round(float(images.float().std()))
    assert data.normalization_for("cifar100", Split(images, torch.zeros(200))) == Normalization()
