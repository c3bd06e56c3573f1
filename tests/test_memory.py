"A long folder run holds no more memory than a short one"
import weakref
import pytest
from zsad_nb import cli
from zsad_nb.bench import peak_memory, peak_of_run, write_pictures


def test_answers_are_let_go(tmp_path, monkeypatch):
    "Of 24 answers written in batches of 4, only a batch or two is ever alive: nothing is collected until the end"
    alive, most, take = weakref.WeakSet(), [], cli.Run.take
    def watched(self, stem, answer):
        alive.add(answer)
        most.append(len(alive))
        return take(self, stem, answer)
    monkeypatch.setattr(cli.Run, 'take', watched)
    folder = write_pictures(tmp_path/'p', 24, size=64)
    for span in ('method', 'auto'):
        assert cli.main(['predict', str(folder), '--out', str(tmp_path/span), '--quiet', '--batch-size', '4', '--range', span, '--maps', 'none']) == 0
    assert len(most) == 48 and max(most) <= 8

def test_peak_memory_sees_what_was_held():
    np = pytest.importorskip('numpy')
    size = int(peak_memory() + 64)*2**20
    a = np.ones(size, np.uint8)
    assert peak_memory() >= size/2**20
    del a

def test_memory_does_not_grow_with_the_folder(tmp_path):
    "The whole process, 16 against 72 pictures. Kept pictures (0.8 MB each) or maps at their size (1 MB) would add 45 MB or more; the allocator's own noise is about 10"
    pytest.importorskip('resource')  # systems without it and without /proc cannot say
    few, many = (peak_of_run(write_pictures(tmp_path/str(n), n, size=512), '--maps', 'npy') for n in (16, 72))
    assert many <= few + 30, f'{few:.0f} MB for 16 pictures, {many:.0f} MB for 72'
