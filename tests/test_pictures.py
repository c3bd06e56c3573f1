"Dirty input, file by file: each is either read rightly or refused in one sentence (what, where, what to do)"
import errno, io, os, re, struct, subprocess, sys, zlib
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from zsad_nb import pictures
from zsad_nb.pictures import as_picture, find_pictures, output_stems, read_map, read_picture, save_map, save_picture, to_rgb, write_atomic
from zsad_nb.types import OutputError, PictureError, Prediction

RAMP = np.add.outer(np.arange(40)*4, np.arange(50)).astype(np.uint8)          # (40 50), no two rows alike
COLOUR = np.stack([RAMP, 255 - RAMP, RAMP//2], -1)


def refused(path, words):
    "The one sentence with which a picture is refused"
    with pytest.raises(PictureError) as e: read_picture(path)
    text = str(e.value)
    assert words in text and str(path) in text, text
    assert '\n' not in text and e.value.hint and len(text) < 300 + len(str(path)), text
    return text


def png_header(width, height, depth=8, colour=2):
    "A PNG that claims a size and holds no pixels to speak of"
    def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, depth, colour, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(b'\0'*64)) + chunk(b'IEND', b'')


# files that cannot be read

def test_missing(tmp_path): refused(tmp_path/'lost.png', 'there is no such file; check the spelling')

def test_folder(tmp_path): refused(tmp_path, 'this is a folder; use find_pictures')

def test_empty_file(tmp_path):
    (tmp_path/'nothing.png').touch()
    refused(tmp_path/'nothing.png', 'the file is empty (0 bytes); copy it again')

def test_text_named_png(tmp_path):
    (tmp_path/'letter.png').write_text('Dear all, this is a text.\n'*20)
    refused(tmp_path/'letter.png', 'not a picture in a known format')

def test_postscript_is_not_run(tmp_path):
    (tmp_path/'a.png').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n')
    refused(tmp_path/'a.png', 'not a picture in a known format')

@pytest.mark.parametrize('ending', ['jpg', 'png', 'tif', 'webp', 'gif', 'bmp'])
def test_cut_off(tmp_path, ending):
    rng = np.random.default_rng(0); f = tmp_path/f'whole.{ending}'
    Image.fromarray(rng.integers(0, 255, (90, 90, 3), dtype=np.uint8)).save(f)
    data = f.read_bytes()
    for share in (.9, .5, .02):
        cut = tmp_path/f'cut.{ending}'; cut.write_bytes(data[:int(len(data)*share)])
        with pytest.raises(PictureError) as e: read_picture(cut)
        assert re.search('damaged|known format', str(e.value)) and 'cut' in str(e.value)

@pytest.mark.filterwarnings('ignore')
def test_damaged_anywhere(tmp_path):
    "Bytes turned over at random give a picture or the one error, never another"
    rng, buf = np.random.default_rng(1), io.BytesIO()
    for kind in ('PNG', 'JPEG', 'TIFF', 'GIF', 'BMP'):
        buf = io.BytesIO(); Image.fromarray(COLOUR).save(buf, kind); data = np.frombuffer(buf.getvalue(), np.uint8)
        for _ in range(60):
            bad = data.copy(); at = rng.integers(0, min(len(bad), 400), 4); bad[at] = rng.integers(0, 256, 4)
            try: assert read_picture(io.BytesIO(bad.tobytes())).mode == 'RGB'
            except PictureError: pass

def test_header_bomb(tmp_path):
    f = tmp_path/'bomb.png'; f.write_bytes(png_header(20_000, 20_000))
    assert f.stat().st_size < 500
    refused(f, 'the limit is 89 million; make it smaller or cut it into tiles')
    f.write_bytes(png_header(11_000, 11_000))                                 # between Pillow's two limits: ours says the size
    with pytest.warns(Image.DecompressionBombWarning): refused(f, '11000 x 11000 pixels, the limit is 89 million')

def test_header_bomb_costs_no_memory(tmp_path):
    "The claim is refused before memory is taken for it: 400 million pixels would be 1.2 GB"
    resource = pytest.importorskip('resource')
    f = tmp_path/'bomb.png'; f.write_bytes(png_header(20_000, 20_000, depth=1, colour=0))
    code = ('import resource, sys; from zsad_nb.pictures import read_picture, PictureError; m=lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n'
            'a=m()\ntry: read_picture(sys.argv[1])\nexcept PictureError: print(m()-a)')
    out = subprocess.run([sys.executable, '-c', code, str(f)], capture_output=True, text=True, check=True).stdout
    assert int(out)*(1 if sys.platform == 'darwin' else 1024) < 30e6

def test_not_allowed(tmp_path, monkeypatch):
    f = tmp_path/'secret.png'; Image.fromarray(COLOUR).save(f); f.chmod(0)
    if os.access(f, os.R_OK):                                                 # root reads everything: the refusal is played
        def no(*a, **k): raise PermissionError(errno.EACCES, 'Permission denied', str(f))
        monkeypatch.setattr('builtins.open', no)
    refused(f, 'you are not allowed to read it; change its permissions')

def test_links(tmp_path):
    (tmp_path/'gone.png').symlink_to(tmp_path/'nowhere.png')
    refused(tmp_path/'gone.png', 'the link leads nowhere')
    (tmp_path/'self.png').symlink_to(tmp_path/'self.png')
    refused(tmp_path/'self.png', 'the link leads nowhere')

@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='this system has no pipes in the file system')
def test_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path/'pipe.png')
    refused(tmp_path/'pipe.png', 'not a regular file')

def test_web_address():
    with pytest.raises(PictureError, match='web address; download'): read_picture('https://example.org/a.png')


# files that look odd and are read rightly

def read_back(tmp_path, img, name, **kw):
    img.save(tmp_path/name, **kw)
    got = read_picture(tmp_path/name)
    assert got.mode == 'RGB' and got.size == img.size
    return np.asarray(got).astype(int)

def test_16_bit(tmp_path):
    assert (read_back(tmp_path, Image.fromarray(RAMP.astype(np.uint16)*257), 'a.png')[..., 0] == RAMP).all()
    assert (read_back(tmp_path, Image.fromarray(RAMP.astype(np.uint16)*257), 'a.tif')[..., 1] == RAMP).all()
    twelve = read_back(tmp_path, Image.fromarray(RAMP.astype(np.uint16)*16), 'b.png')   # 12-bit data: dark, not guessed
    assert twelve.max() <= 16

def test_1_bit(tmp_path): assert set(np.unique(read_back(tmp_path, Image.fromarray(RAMP > 99), 'a.png'))) == {0, 255}

def test_cmyk(tmp_path):
    got = read_back(tmp_path, Image.fromarray(COLOUR).convert('CMYK'), 'a.jpg', quality=98)
    assert np.abs(got - COLOUR).mean() < 6

def test_rgba_lies_on_white(tmp_path):
    a = np.dstack([COLOUR, np.zeros_like(RAMP)]); a[:20, :, 3] = 255
    got = read_back(tmp_path, Image.fromarray(a), 'a.png')
    assert (got[:20] == COLOUR[:20]).all() and (got[20:] == 255).all()

def test_la(tmp_path):
    got = read_back(tmp_path, Image.fromarray(np.dstack([RAMP, np.where(RAMP > 99, 255, 0)]).astype(np.uint8)), 'a.png')
    assert (got[RAMP <= 99] == 255).all() and (got[RAMP > 99][:, 0] == RAMP[RAMP > 99]).all()

def test_palette_with_transparency(tmp_path):
    img = Image.new('P', (6, 4), 1)
    img.putpalette([255, 0, 0, 0, 0, 255]); img.putpixel((0, 0), 0)
    for transparency in (0, b'\x00\xff'):
        got = read_back(tmp_path, img, 'a.png', transparency=transparency)
        assert (got[0, 0] == 255).all() and (got[1, 1] == (0, 0, 255)).all()

def test_grey_and_rgb_with_a_transparent_colour(tmp_path):
    got = read_back(tmp_path, Image.fromarray(COLOUR), 'a.png', transparency=tuple(int(v) for v in COLOUR[0, 0]))
    assert (got[0, 0] == 255).all() and (got[9, 9] == COLOUR[9, 9]).all()

def test_float_tiff(tmp_path):
    unit = RAMP.astype(np.float32)/255
    assert (read_back(tmp_path, Image.fromarray(unit), 'a.tif')[..., 0] == RAMP).all()
    Image.fromarray(unit*7).save(tmp_path/'b.tif')
    refused(tmp_path/'b.tif', 'where 0 to 1 is expected; scale them')
    Image.fromarray(np.full((3, 3), np.nan, np.float32)).save(tmp_path/'c.tif')
    refused(tmp_path/'c.tif', 'NaN or infinite')

def test_32_bit_integers(tmp_path):
    Image.fromarray(RAMP.astype(np.int32)*1_000_000).save(tmp_path/'a.tif')
    refused(tmp_path/'a.tif', 'where 0 to 255 is expected')
    img = Image.fromarray(RAMP.astype(np.int32)*257)                          # how Pillow before 11 hands out 16-bit PNGs
    assert img.mode == 'I' and (np.asarray(to_rgb(img))[..., 0] == RAMP).all()

@pytest.mark.parametrize('flag', range(1, 9))
def test_exif(tmp_path, flag):
    "A camera held in each of the eight ways gives the same picture"
    T = Image.Transpose
    undo = {1: None, 2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE, 6: T.ROTATE_90, 7: T.TRANSVERSE, 8: T.ROTATE_270}[flag]
    img = Image.fromarray(COLOUR); stored = img if undo is None else img.transpose(undo)
    exif = stored.getexif(); exif[0x0112] = flag
    stored.save(tmp_path/'a.png', exif=exif)
    assert (np.asarray(read_picture(tmp_path/'a.png')) == COLOUR).all()

@pytest.mark.filterwarnings('ignore:Corrupt EXIF')
def test_damaged_exif_costs_no_picture(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path/'a.jpg', exif=b'Exif\0\0II*\0\xff\xff\xff\xffgarbage')
    assert read_picture(tmp_path/'a.jpg').size == (50, 40)

@pytest.mark.parametrize('size', [(1, 1), (1, 5000), (5000, 1)])
def test_odd_sizes(tmp_path, size):
    got = read_back(tmp_path, Image.new('RGB', size, (9, 99, 199)), 'a.png')
    assert (got == (9, 99, 199)).all()
    p = Prediction(.5, np.full((16, 16), .9, np.float32), np.zeros((1, 2, 2), np.float32), size=size, path=tmp_path/'a.png')
    assert p.map_at_size().shape == size[::-1] and max(p.overlay().size) <= 1024
    assert p._repr_jpeg_()[:2] == b'\xff\xd8'

def test_first_frame_of_an_animation(tmp_path):
    Image.new('RGB', (9, 9), 'red').save(tmp_path/'a.gif', save_all=True, append_images=[Image.new('RGB', (9, 9), 'blue')])
    assert read_picture(tmp_path/'a.gif').getpixel((4, 4)) == (255, 0, 0)

def test_many_pages(tmp_path):
    Image.new('RGB', (9, 9), 'red').save(tmp_path/'a.tif', save_all=True, append_images=[Image.new('RGB', (5, 5), 'blue')])
    assert read_picture(tmp_path/'a.tif').size == (9, 9)


# arrays and tensors

@pytest.mark.parametrize('bad,words', [
    (np.full((4, 4), np.nan), 'NaN or infinite'), (np.full((4, 4, 3), np.inf), 'NaN or infinite'),
    (np.full((4, 4, 3), 255.), 'where 0 to 1 is expected'), (np.full((4, 4), -.5), 'where 0 to 1 is expected'),
    (np.full((4, 4), 256), 'where 0 to 255 is expected'), (np.zeros((5, 4, 6)), 'is not one picture'), (np.zeros((2, 4, 4, 3)), 'is not one picture'),
    (np.zeros(9), 'is not one picture'), (np.float64(3), 'a float64 is not a picture'), (np.zeros((0, 4, 3)), 'holds no pixels'), (np.zeros((4, 4), complex), 'are not numbers'),
    (np.full((4, 4), 'x'), 'are not numbers'), ([[1, 2]], 'a list is not a picture'), (None, 'a NoneType is not a picture'), (7, 'a int is not a picture')])
def test_bad_arrays(bad, words):
    with pytest.raises(PictureError) as e: as_picture(bad, name='frame 7')
    assert str(e.value).startswith('frame 7: ') and words in str(e.value) and e.value.hint

def test_good_arrays():
    for x in (COLOUR, COLOUR/255., COLOUR.astype(np.int64), COLOUR.astype(np.uint16)*257, COLOUR.transpose(2, 0, 1), np.asfortranarray(COLOUR), COLOUR[::-1][::-1]):
        assert (np.asarray(as_picture(x)) == COLOUR).all()
    assert as_picture(RAMP).mode == 'RGB' and as_picture(RAMP[..., None]).size == (50, 40)
    assert (np.asarray(as_picture(np.dstack([COLOUR, 0*RAMP]))) == 255).all()

def test_tensors():
    torch = pytest.importorskip('torch')
    t = torch.from_numpy(COLOUR.transpose(2, 0, 1).copy())
    assert (np.asarray(as_picture(t)) == COLOUR).all()
    assert (np.asarray(as_picture((t/255.).requires_grad_())) == COLOUR).all()
    assert as_picture(torch.rand(3, 8, 3)).size == (3, 8)                     # channels first wins for a tensor
    with pytest.raises(PictureError, match='not one picture'): as_picture(torch.rand(1, 3, 8, 8))

def test_what_is_handed_over_stays_as_it_is():
    a = COLOUR.copy(); as_picture(a); assert (a == COLOUR).all()
    img = Image.fromarray(COLOUR); np.asarray(as_picture(img)); assert (np.asarray(img) == COLOUR).all()


# finding

def test_find_in_folders(tmp_path):
    for name in ('b.png', 'a.JPG', 'sub/c.tiff', '.hidden/d.png', 'sub/._c.tiff', 'notes.txt', 'sub/.DS_Store'):
        (tmp_path/name).parent.mkdir(exist_ok=True); (tmp_path/name).touch()
    found, failures = find_pictures(tmp_path)
    assert [p.relative_to(tmp_path).as_posix() for p in found] == ['a.JPG', 'b.png', 'sub/c.tiff'] and not failures
    assert len(find_pictures([tmp_path, tmp_path/'b.png', f'{tmp_path}/*.png'])[0]) == 3
    assert find_pictures(tmp_path/'notes.txt')[0] == [tmp_path/'notes.txt']   # named explicitly

@pytest.mark.parametrize('what,words', [('empty', 'holds no pictures; known endings'), ('lost', 'no such file or folder; check'), ('lost/*.png', 'no picture matches'), ('lost/**/*.png', 'no picture matches')])
def test_nothing_found(tmp_path, what, words):
    (tmp_path/'empty').mkdir()
    found, failures = find_pictures(tmp_path/what)
    assert not found and len(failures) == 1 and words in failures[0].reason and failures[0].path == tmp_path/what

def test_good_ones_survive_bad_ones(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path/'a.png')
    found, failures = find_pictures([tmp_path/'lost.png', tmp_path/'a.png', tmp_path/'b*'])
    assert found == [tmp_path/'a.png'] and len(failures) == 2

def test_symlink_loops_end(tmp_path):
    deep = tmp_path/'a'/'b'; deep.mkdir(parents=True); (deep/'x.png').touch()
    (deep/'up').symlink_to(tmp_path); (deep/'up2').symlink_to(tmp_path/'a'); (tmp_path/'a'/'again').symlink_to(deep)
    (tmp_path/'self').symlink_to(tmp_path/'self')
    for what in (tmp_path, tmp_path/'**'/'*.png', tmp_path/'*', tmp_path/'**'): assert len(find_pictures(what)[0]) == 1, what

def test_unreadable_folder(tmp_path, monkeypatch):
    (tmp_path/'locked').mkdir(); (tmp_path/'ok.png').touch(); (tmp_path/'locked').chmod(0)
    if os.access(tmp_path/'locked', os.R_OK):                                 # root again
        scandir = os.scandir
        def no(path='.'):
            if Path(path).name == 'locked': raise PermissionError(errno.EACCES, 'Permission denied', str(path))
            return scandir(path)
        monkeypatch.setattr(os, 'scandir', no)
    found, failures = find_pictures(tmp_path)
    (tmp_path/'locked').chmod(0o700)
    assert [p.name for p in found] == ['ok.png'] and 'cannot be listed (Permission denied)' in failures[0].reason


# names and writing

def test_duplicate_names():
    stems = output_stems(['l/01.png', 'r/01.png', 'r/02.png', 'r/02.jpg', 'p/x/03.png', 'q/x/03.png'])
    assert stems == ['l_01', 'r_01', '02_png', '02_jpg', 'p_x_03', 'q_x_03']

def test_stems_are_always_different():
    rng = np.random.default_rng(0)
    for _ in range(200):
        paths = ['/'.join(rng.choice(['a', 'A', 'a_b', 'b'], rng.integers(0, 4)).tolist() + [str(rng.choice(['a', 'b', 'a_b', 'b_a', 'a_2']))]) + str(rng.choice(['.png', '.jpg', ''])) for _ in range(12)]
        stems = output_stems(paths)
        assert len({s.casefold() for s in stems}) == len(paths) and not any('/' in s for s in stems)

def test_five_thousand_stems_are_quick():
    import time
    start = time.perf_counter(); output_stems([f'd{i % 50}/{i//50}.png' for i in range(5000)])
    assert time.perf_counter() - start < 2

def no_space(*a, **k): raise OSError(errno.ENOSPC, 'No space left on device')

class Full(io.RawIOBase):
    "A file on a disk with room for ten more bytes"
    def __init__(self, f): self.f = f
    def writable(self): return True
    def write(self, b): self.f.write(bytes(b)[:10]); no_space()
    def close(self): self.f.close(); super().close()

def test_full_disk(tmp_path, monkeypatch):
    target = write_atomic(tmp_path/'a.npy', b'old')
    real = open
    monkeypatch.setattr('builtins.open', lambda f, mode='r', *a, **k: Full(real(f, mode, *a, **k)) if 'x' in mode else real(f, mode, *a, **k))
    for write in (lambda: write_atomic(target, b'new'*99), lambda: save_map(target, np.zeros((9, 9))), lambda: save_picture(tmp_path/'b.png', Image.new('RGB', (9, 9)))):
        with pytest.raises(OutputError, match='the disk is full; free some space'): write()
    assert target.read_bytes() == b'old' and [p.name for p in tmp_path.iterdir()] == ['a.npy']

@pytest.mark.skipif(not Path('/dev/full').exists(), reason='this system has no /dev/full')
def test_really_full_disk(tmp_path):
    with pytest.raises(OutputError, match='the disk is full'):
        def through(f):
            with open('/dev/full', 'wb', buffering=0) as full: full.write(b'x')
        write_atomic(tmp_path/'a', through)
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('number,words', [(errno.EACCES, 'not allowed to write there'), (errno.EROFS, 'not allowed to write there'), (errno.EDQUOT, 'quota'), (errno.EIO, 'Input/output error')])
def test_unwritable(tmp_path, monkeypatch, number, words):
    def no(*a, **k): raise OSError(number, os.strerror(number))
    monkeypatch.setattr(pictures.os, 'replace', no)
    with pytest.raises(OutputError, match=words) as e: save_picture(tmp_path/'new'/'a.png', Image.new('RGB', (9, 9)))
    assert str(tmp_path/'new'/'a.png') in str(e.value) and not list((tmp_path/'new').iterdir())

def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path/'out').touch()
    with pytest.raises(OutputError, match='a file stands where a folder should be'): write_atomic(tmp_path/'out'/'a', b'')
    with pytest.raises(OutputError, match='a folder of that name exists'): (tmp_path/'b').mkdir(); write_atomic(tmp_path/'b', b'')
    with pytest.raises(OutputError, match='too long'): write_atomic(tmp_path/('x'*300), b'')

def test_interrupted(tmp_path):
    def stop(f): f.write(b'half'); raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): write_atomic(tmp_path/'a', stop)
    assert not list(tmp_path.iterdir())

def test_written_files_have_ordinary_permissions(tmp_path):
    plain = tmp_path/'plain'; plain.touch()
    assert write_atomic(tmp_path/'a', b'').stat().st_mode == plain.stat().st_mode

def test_prediction_saves_whole(tmp_path):
    p = Prediction(.9, np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8), np.zeros((1, 2, 2), np.float32), size=(50, 40), kept=COLOUR, map_range=(0, 1))
    files = p.save(tmp_path, stem='a', map_format='png')
    assert sorted(f.name for f in tmp_path.iterdir()) == ['a_map.png', 'a_overlay.png']
    assert np.abs(read_map(files['map']) - p.map).max() < 1e-4 and read_picture(files['overlay']).size == (50, 40)

def test_read_map_trusts_no_pickle(tmp_path):
    np.save(tmp_path/'a.npy', np.array([{}], object), allow_pickle=True)
    with pytest.raises(ValueError): read_map(tmp_path/'a.npy')
