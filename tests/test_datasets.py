"""Every reader on a miniature of its published tree, and everything that can be wrong with a folder.

A miniature is a list of lines. `a/b.png` plants a normal picture, `a/b.png > c/d.png` a defective one and its mask,
`a/b.png > c/d.png empty` a normal one with a mask that marks nothing, `a/b.png !` a defective one without mask. Braces expand, on both sides alike.
A defective picture shows a bright block at a place of its own, and its mask marks that place: a mask paired with the wrong picture is found by looking.
"""
import csv, io, json, os, pickle, re, subprocess, sys, warnings, zlib
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from zsad_nb.benchmarks_data import BENCHMARKS, Counts
from zsad_nb.datasets import AnomalyDataset, Collate, CountWarning, Folder, Meta, READERS, Row, Synthetic, _count_message, load_dataset, looks_inverted, read_mask
from zsad_nb.types import ConfigError, Failure, PictureError, Sample, shared_dir

W, H = 48, 32

def expand(line):
    "'x{a,b}y' -> ['xay', 'xby'], all braces of a line in step with the first of the same length"
    m = re.search(r'\{([^}]*,[^}]*)\}', line)
    if not m: return [line]
    words = m.group(1).split(',')
    return [s for w in words for s in expand(line.replace(m.group(0), w))]

def block(name):
    n = zlib.crc32(name.encode()); x, y = n % (W - 12), (n // 997) % (H - 10)
    m = np.zeros((H, W), bool); m[y:y + 8, x:x + 10] = True
    return m

def write(path, a):
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {'jpg': 'JPEG', 'jpeg': 'JPEG', 'tif': 'TIFF'}.get(path.suffix[1:].lower(), path.suffix[1:].upper())
    Image.fromarray(a).save(path, kind, **(dict(quality=90) if kind == 'JPEG' else {}))

def plant(root, lines, on=255):
    "Make a miniature; the texts among the lines are `path = content`"
    for line in (l.strip() for l in lines):
        if ' = ' in line:
            path, text = line.split(' = ', 1)
            (root/path).parent.mkdir(parents=True, exist_ok=True); (root/path).write_text(text.replace('\\n', '\n')); continue
        for one in expand(line):
            picture, _, mask = one.partition(' > ')
            empty, bare = mask.endswith(' empty'), picture.endswith(' !')
            picture, mask = picture.removesuffix(' !'), mask.removesuffix(' empty')
            marks = block(picture) if (mask or bare) and not empty else np.zeros((H, W), bool)
            shade = np.random.default_rng(zlib.crc32(one.encode())).integers(40, 90, (H, W, 3)).astype(np.uint8)
            shade[marks] = 240
            write(root/picture, shade)
            if mask: write(root/mask, (marks*on).astype(np.uint8))
    return root

def faithful(ds):
    "Does every mask mark the bright block of its own picture, and nothing else?"
    for i, r in enumerate(ds.rows):
        s = ds[i]
        assert s.image.size == (W, H) and s.label == r.label
        if s.mask is None: continue
        assert s.mask.dtype == bool and s.mask.shape == (H, W)
        bright = np.asarray(s.image).mean(-1) > 150
        assert (bright == s.mask).mean() > .98, f'{r.picture} does not fit {r.mask}'
        assert s.mask.any() == bool(s.label)

def read(name, root, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', CountWarning)
        return load_dataset(name, root, **kw)

VISA_CSV = 'object,split,label,image,mask\\ncandle,train,normal,candle/Data/Images/Normal/0000.JPG,\\ncandle,test,normal,candle/Data/Images/Normal/0001.JPG,\\ncandle,test,anomaly,candle/Data/Images/Anomaly/000.JPG,candle/Data/Masks/Anomaly/000.png\\npcb1,test,anomaly,pcb1/Data/Images/Anomaly/000.JPG,pcb1/Data/Masks/Anomaly/000.png\\npcb1,test,normal,pcb1/Data/Images/Normal/0000.JPG,\\n'
BMAD_FORMS = {'BMAD': ['{T}/train/good/00003_60.png', '{T}/{valid,test}/good/img/{00025_99,00100_60}.png', '{T}/{valid,test}/Ungood/img/{00124_60,00002_70}.png'],
              'flat': ['{T}/train/good/1000.png', '{T}/{valid,test}/good/{1080,1081}.png', '{T}/{valid,test}/Ungood/{1000,100}.png !']}

# key, where below the root, lines of the tree, (normal, defective) of test, masks in test, (normal, defective) of train
TREES = [
 ('mvtec', 'official', ['mvtec_anomaly_detection/{bottle,metal_nut}/train/good/{000,001,002}.png', 'mvtec_anomaly_detection/{bottle,metal_nut}/test/good/{000,001}.png',
    'mvtec_anomaly_detection/bottle/test/{broken_large,contamination}/{000,001}.png > mvtec_anomaly_detection/bottle/ground_truth/{broken_large,contamination}/{000,001}_mask.png',
    'mvtec_anomaly_detection/metal_nut/test/flip/000.png > mvtec_anomaly_detection/metal_nut/ground_truth/flip/000_mask.png',
    'mvtec_anomaly_detection/bottle/license.txt = CC BY-NC-SA', 'mvtec_anomaly_detection/bottle/readme.txt = hello'], (4, 5), 5, (6, 0)),
 ('visa', 'official table', ['VisA_20220922/candle/Data/Images/Normal/{0000,0001}.JPG', 'VisA_20220922/pcb1/Data/Images/Normal/0000.JPG',
    'VisA_20220922/{candle,pcb1}/Data/Images/Anomaly/000.JPG > VisA_20220922/{candle,pcb1}/Data/Masks/Anomaly/000.png', 'VisA_20220922/candle/image_anno.csv = image,label,mask\\nx,y,z',
    f'VisA_20220922/split_csv/1cls.csv = {VISA_CSV}', 'VisA_20220922/split_csv/2cls_fewshot.csv = object,split,label,image,mask\\n'], (2, 2), 2, (1, 0)),
 ('visa', '1cls tree', ['VisA_pytorch/1cls/candle/{train,test}/good/{0000,0007}.JPG', 'VisA_pytorch/1cls/candle/test/bad/000.JPG > VisA_pytorch/1cls/candle/ground_truth/bad/000.png',
    'VisA_pytorch/2cls_highshot/candle/{train,test}/good/{0000,0001,0002,0003}.JPG', 'VisA_pytorch/2cls_highshot/candle/{train,test}/bad/{000,001}.JPG !'], (2, 1), 1, (2, 0)),
 ('btad', 'official', ['BTech_Dataset_transformed/{01,03}/train/ok/0000.bmp', 'BTech_Dataset_transformed/02/train/ok/0000.png', 'BTech_Dataset_transformed/{01,03}/test/ok/0000.bmp',
    'BTech_Dataset_transformed/01/test/ko/{0000,0001}.bmp > BTech_Dataset_transformed/01/ground_truth/ko/{0000,0001}.png',
    'BTech_Dataset_transformed/02/test/ko/0000.png > BTech_Dataset_transformed/02/ground_truth/ko/0000.png',
    'BTech_Dataset_transformed/03/test/ko/0000.bmp > BTech_Dataset_transformed/03/ground_truth/ko/0000.bmp'], (2, 4), 4, (3, 0)),
 ('mpdd', 'official', ['MPDD/{tubes,connector}/{train,test}/good/{000,001}.png', 'MPDD/tubes/test/anomalous/000.png > MPDD/tubes/ground_truth/anomalous/000_mask.png',
    'MPDD/connector/test/parts_mismatch/000.png > MPDD/connector/ground_truth/parts_mismatch/000_mask.png'], (4, 2), 2, (4, 0)),
 ('ksdd', 'official', ['KolektorSDD/kos01/Part{0,1}.jpg > KolektorSDD/kos01/Part{0,1}_label.bmp empty', 'KolektorSDD/kos{02,50}/Part5.jpg > KolektorSDD/kos{02,50}/Part5_label.bmp'], (2, 2), 2, None),
 ('ksdd', "AnomalyCLIP's folder", ['SDD/electrical commutators/{train,test}/good/kos01_Part0_{0,1}.png',
    'SDD/electrical commutators/test/defect/kos02_Part5_1.png > SDD/electrical commutators/ground_truth/defect/kos02_Part5_1.png'], (2, 1), 1, (2, 0)),
 ('ksdd', "AdaCLIP's conversion", ['SDD_anomaly_detection/SDD/{train,test}/good/kos01_Part0_{0,1}.png',
    'SDD_anomaly_detection/SDD/test/defect/kos02_Part5_1.png > SDD_anomaly_detection/SDD/ground_truth/defect/kos02_Part5_1_mask.png'], (2, 1), 1, (2, 0)),
 ('ksdd2', 'official', ['KolektorSDD2/train/{10000,10001}.png > KolektorSDD2/train/{10000,10001}_GT.png empty', 'KolektorSDD2/train/10002.png > KolektorSDD2/train/10002_GT.png',
    'KolektorSDD2/test/20000.png > KolektorSDD2/test/20000_GT.png empty', 'KolektorSDD2/test/{20003,20004}.png > KolektorSDD2/test/{20003,20004}_GT.png'], (1, 2), 2, (2, 1)),
 ('ksdd2', "Bayes-PFL's conversion", ['KSDD2/Metal/test/good/KSDD2-metal-null-{000406,000407}.bmp', 'KSDD2/Metal/test/anomaly/KSDD2-metal-{000001,000002}.bmp > KSDD2/Metal/ground_truth/anomaly/KSDD2-metal-{000001,000002}.png'], (2, 2), 2, None),
 ('dagm', 'Kaggle', ['DAGM_KaggleUpload/Class{1,10}/{Train,Test}/{0001,0003}.PNG', 'DAGM_KaggleUpload/Class{1,10}/{Train,Test}/0002.PNG > DAGM_KaggleUpload/Class{1,10}/{Train,Test}/Label/0002_label.PNG',
    'DAGM_KaggleUpload/Class1/Test/Label/Labels.txt = 1\\n'], (4, 2), 2, (4, 2)),
 ('dagm', "AdaCLIP's conversion", ['DAGM_anomaly_detection/Class1/{train,test}/good/{0001,0003}.PNG', 'DAGM_anomaly_detection/Class1/test/defect/0002.PNG > DAGM_anomaly_detection/Class1/ground_truth/defect/0002_label.PNG'], (2, 1), 1, (2, 0)),
 ('dtd', 'official', ['DTD-Synthetic/{Woven_001,Mesh_114}/{train,test}/good/{000,001}.png', 'DTD-Synthetic/{Woven_001,Mesh_114}/test/bad/{000,001}.png > DTD-Synthetic/{Woven_001,Mesh_114}/ground_truth/bad/{000,001}_mask.png'], (4, 4), 4, (4, 0)),
 ('brainmri', 'Kaggle, every picture twice', ['no/{1 no.jpeg,N16.jpg,no 92.jpg}', 'yes/{Y1.jpg,Y10.JPG} !', 'brain_tumor_dataset/no/{1 no.jpeg,N16.jpg,no 92.jpg}', 'brain_tumor_dataset/yes/{Y1.jpg,Y10.JPG} !'], (3, 2), 0, None),
 ('brainmri', "AdaCLIP's tree", ['BrainMRI/brain_mri/test/good/{1,2}.jpg', 'BrainMRI/brain_mri/test/defect/Y1.JPG !'], (2, 1), 0, None),
 ('br35h', 'Kaggle', ['br35/no/no{0,1}.jpg', 'br35/yes/y{0,1,2}.jpg !', 'br35/pred/pred{0,1}.jpg', 'br35/Br35H-Mask-RCNN/TRAIN/y0.jpg !'], (2, 3), 0, None),
 ('headct', 'Kaggle', ['head_ct/head_ct/{000,001,010}.png !', 'head_ct/head_ct/{100,199}.png', 'labels.csv = id, hemorrhage\\n0,1\\n1,1\\n10,1\\n100,0\\n199,0\\n'], (2, 3), 0, None),
 ('headct', "AnomalyCLIP's tree", ['HeadCT_anomaly_detection/brain/test/good/{100,101}.png', 'HeadCT_anomaly_detection/brain/test/defect/000.png !'], (2, 1), 0, None),
 ('covid19', 'present release', ['COVID-19_Radiography_Dataset/COVID/images/COVID-{1,2}.png > COVID-19_Radiography_Dataset/COVID/masks/COVID-{1,2}.png',
    'COVID-19_Radiography_Dataset/Normal/images/Normal-{1,2,3}.png > COVID-19_Radiography_Dataset/Normal/masks/Normal-{1,2,3}.png',
    'COVID-19_Radiography_Dataset/Viral Pneumonia/images/Viral Pneumonia-1.png', 'COVID-19_Radiography_Dataset/Lung_Opacity/images/Lung_Opacity-1.png'], (3, 2), 0, None),
 ('covid19', 'first release', ['COVID-19_Radiography_Dataset/NORMAL/NORMAL ({1,2}).png', 'COVID-19_Radiography_Dataset/COVID-19/COVID-19 (1).png !', 'COVID-19_Radiography_Dataset/Viral Pneumonia/Viral Pneumonia (1).png'], (2, 1), 0, None),
 *[(key, 'BMAD', [f'{top}/train/good/00003_60.png', f'{top}/{v}/good/img/00025_99.png', f'{top}/test/good/img/{{00000_96,00000_97}}.png',
    f'{top}/{v}/{u}/img/00124_60.png > {top}/{v}/{u}/label/00124_60.png', f'{top}/test/{u}/img/{{00002_60,00002_68}}.png > {top}/test/{u}/label/{{00002_60,00002_68}}.png'], (2, 2), 2, (1, 0))
   for key, top, v, u in (('brain_ad', 'Brain_AD/BraTS2021_slice', 'valid', 'Ungood'), ('liverct', 'Liver_AD/hist_DIY', 'valid', 'ungood'), ('resc', 'Retina_RESC_AD/RESC', 'val', 'ungood'))],
 *[(key, 'MVFA-AD', [f'{top}/{{valid,test}}/good/img/{{1,2}}.png', f'{top}/{{valid,test}}/Ungood/img/{{3,4,5}}.png > {top}/{{valid,test}}/Ungood/anomaly_mask/{{3,4,5}}.png'], (2, 3), 3, None)
   for key, top in (('brain_ad', 'Brain_AD'), ('liverct', 'Liver_AD'), ('resc', 'Retina_RESC_AD'))],
 ('liverct', 'img and label outside', ['Liver/Train/hist_DIY/train/good/1_1.png', 'Liver/Train/hist_DIY/test/img/good/8_332.png', 'Liver/Train/hist_DIY/test/img/Ungood/{4_487,9_478}.png > Liver/Train/hist_DIY/test/label/Ungood/{4_487,9_478}.png'], (1, 2), 2, (1, 0)),
 ('oct17', 'BMAD', ['OCT2017/train/good/NORMAL-1.jpeg', 'OCT2017/test/good/NORMAL-5171640-{1,2}.jpeg', 'OCT2017/test/Ungood/{CNV-6294785-1,DME-9583225-1,DRUSEN-9837663-1}.jpeg !'], (2, 3), 0, (1, 0)),
 ('oct17', 'MVFA-AD', ['Retina_OCT2017_AD/{valid,test}/good/img/NORMAL-1.jpeg', 'Retina_OCT2017_AD/{valid,test}/Ungood/img/{CNV-1,DME-1}.jpeg !'], (1, 2), 0, None),
 ('his', 'BMAD', ['camelyon16/train/good/{1000,1001}.png', 'camelyon16/{valid,test}/good/1080.png', 'camelyon16/{valid,test}/Ungood/{1000,100}.png !'], (1, 2), 0, (2, 0)),
 ('isic', 'official', ['ISBI/ISBI2016_ISIC_Part1_Test_Data/ISIC_{0000003,0011392}.jpg > ISBI/ISBI2016_ISIC_Part1_Test_GroundTruth/ISIC_{0000003,0011392}_Segmentation.png'], (0, 2), 2, None),
 ('isic', "AnomalyCLIP's tree", ['ISBI/skin/test/bad/ISIC_{0000003,0011392}.jpg > ISBI/skin/ISBI2016_ISIC_Part1_Test_GroundTruth/ISIC_{0000003,0011392}_Segmentation.png'], (0, 2), 2, None),
 ('clinicdb', 'figshare', ['Polyp_DataSet/CVC-ClinicDB/images/{1,2,10}.png > Polyp_DataSet/CVC-ClinicDB/masks/{1,2,10}.png', 'Polyp_DataSet/Kvasir/images/{a,b,c,d}.png > Polyp_DataSet/Kvasir/masks/{a,b,c,d}.png'], (0, 3), 3, None),
 ('clinicdb', 'official', ['CVC-ClinicDB/Original/{1,2}.tif > CVC-ClinicDB/Ground Truth/{1,2}.tif', 'CVC-ClinicDB/README.txt = hello'], (0, 2), 2, None),
 ('clinicdb', 'Kaggle, twice', ['PNG/Original/{1,2}.png > PNG/Ground Truth/{1,2}.png', 'TIF/Original/{1,2}.tif > TIF/Ground Truth/{1,2}.tif'], (0, 2), 2, None),
 ('clinicdb', "AdaCLIP's tree", ['CVC-ClinicDB/ClinicDB/test/defect/{1,2}.png > CVC-ClinicDB/ClinicDB/ground_truth/defect/{1,2}.png'], (0, 2), 2, None),
 ('colondb', 'figshare', ['CVC-ColonDB/images/{1,2}.png > CVC-ColonDB/masks/{1,2}.png', 'CVC-ClinicDB/images/{1,2,3}.png > CVC-ClinicDB/masks/{1,2,3}.png'], (0, 2), 2, None),
 ('kvasir', 'figshare', ['Kvasir/images/cju0{a,b}.png > Kvasir/masks/cju0{a,b}.png'], (0, 2), 2, None),
 ('kvasir', 'Kvasir-SEG, JPEG masks', ['Kvasir-SEG/images/cju0{a,b}.jpg > Kvasir-SEG/masks/cju0{a,b}.jpg', 'Kvasir-SEG/kavsir_bboxes.json = {}'], (0, 2), 2, None),
 ('endo', 'official', ['EndoTect_2020_Segmentation_Test_Dataset/images/6eacc283-{1,2}.jpg > EndoTect_2020_Segmentation_Test_Dataset/masks/6eacc283-{1,2}.png'], (0, 2), 2, None),
 ('tn3k', 'official', ['tn3k/test-image/{0000,0001}.jpg > tn3k/test-mask/{0000,0001}.jpg', 'tn3k/trainval-image/{0000,0001,0002}.jpg > tn3k/trainval-mask/{0000,0001,0002}.jpg', 'tn3k/tn3k-trainval-fold0.json = {}'], (0, 2), 2, (0, 3)),
]

def zipped(lines):
    "Braces of equal length move in step between picture and mask: expand them one by one"
    out = []
    for line in lines:
        if ' = ' in line or ' > ' not in line: out.append(line); continue
        left, _, right = line.partition(' > ')
        tail = ' empty' if right.endswith(' empty') else ''
        pictures, masks = expand(left), expand(right.removesuffix(' empty'))
        assert len(pictures) == len(masks), line
        out += [f'{p} > {m}{tail}' for p, m in zip(pictures, masks)]
    return out

@pytest.mark.parametrize('key,form,lines,test,masks,train', TREES, ids=[f'{t[0]}: {t[1]}' for t in TREES])
def test_published_tree(tmp_path, key, form, lines, test, masks, train):
    plant(tmp_path/'data', zipped(lines))
    with pytest.warns(CountWarning, match=f'{test[0]}/{test[1]} found, .* expected by'):
        ds = load_dataset(key, tmp_path/'data')
    assert ds.total() == test and ds.splits == ['test']
    assert sum(r.mask is not None for r in ds.rows if r.label) == masks
    assert set(ds.categories) <= set(BENCHMARKS[key].categories)
    if masks or ds.has_masks: faithful(ds)
    else: assert all(ds[i].mask is None for i in range(len(ds)))
    if train: assert read(key, tmp_path/'data', split='train').total() == train
    serious = {p.kind for p in ds.check()} - {'counts', 'one class', 'left out'}
    assert not serious, ds.check()
    with pytest.raises(ConfigError, match='expected by'): load_dataset(key, tmp_path/'data', strict=True)

def test_every_benchmark_has_a_miniature():
    assert {t[0] for t in TREES} == set(BENCHMARKS) and len(BENCHMARKS) == 23

@pytest.mark.parametrize('key,form,lines,test,masks,train', TREES, ids=[f'{t[0]}: {t[1]}' for t in TREES])
def test_root_may_be_the_top_folder_itself(tmp_path, key, form, lines, test, masks, train):
    plant(tmp_path, zipped(lines))
    tops = {l.split(' = ')[0].split('/')[0] for l in lines}
    if len(tops) == 1: assert read(key, tmp_path/tops.pop()).total() == test

def test_exact_counts_are_silent(tmp_path, monkeypatch):
    monkeypatch.setitem(BENCHMARKS, 'ksdd', replace(BENCHMARKS['ksdd'], counts=(Counts('us', 2, 2),)))
    plant(tmp_path, zipped(next(t for t in TREES if t[:2] == ('ksdd', 'official'))[2]))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert load_dataset('ksdd', tmp_path, strict=True).total() == (2, 2)

def rows(category, good, bad, split='test'): return [Row(Path(f'{category}{i}'), category, split, int(i >= good)) for i in range(good + bad)]

def test_count_sentences():
    d = BENCHMARKS['ksdd']
    say = lambda d, rows, cats=None: _count_message(AnomalyDataset(rows, d.title, d.key, d), 'test', cats)
    assert say(d, rows('electrical commutators', 181, 74)) == ''
    assert say(d, rows('electrical commutators', 286, 54)) == "KSDD: 286/54 found, 181/74 expected by AnomalyCLIP's split; 286/54 is AdaCLIP's conversion, used by ViP2-CLIP"
    assert say(d, rows('electrical commutators', 3, 4)) == "KSDD: 3/4 found, 181/74 expected by AnomalyCLIP's split"
    m = BENCHMARKS['mvtec']
    full = [r for c, (g, b) in m.known.items() for r in rows(c, g, b)]
    assert say(m, full) == ''
    assert say(m, full[:-1]) == 'MVTec AD: 467/1257 found, 467/1258 expected by the published split; different: zipper 32/118 instead of 32/119'
    assert say(m, [r for r in full if r.category != 'wood']) == 'MVTec AD: 448/1198 found, 467/1258 expected by the published split; missing: wood'
    some = [r for r in full if r.category in ('wood', 'tile')]
    assert say(m, some, ['wood', 'tile']) == '' and '52/143 found, 52/144' in say(m, some[:-1], ['wood', 'tile'])

def test_categories_and_names(tmp_path):
    plant(tmp_path, zipped(TREES[0][2]))
    ds = read('MVTec-AD', tmp_path, categories='metal_nut')
    assert ds.categories == ['metal_nut'] and ds.noun('metal_nut') == 'metal nut' and ds.key == 'mvtec'
    with pytest.raises(ConfigError, match="no category 'nut'; it has bottle, metal_nut"): read('mvtec', tmp_path, categories=['nut'])
    with pytest.raises(ConfigError, match='did you mean'): load_dataset('mvtek', tmp_path)
    with pytest.raises(ConfigError, match='get it by hand from https'): load_dataset('visa', tmp_path)
    with pytest.raises(ConfigError, match='2 folders below the root could be meant'): load_dataset('headct', tmp_path)    # the tree of something else
    with pytest.raises(ConfigError, match='no such folder'): load_dataset('mvtec', tmp_path/'nowhere')

# ---------------------------------------------------------------- folders of one's own

def test_visa_masks_with_small_numbers(tmp_path):
    plant(tmp_path, zipped(TREES[1][2]), on=3)
    faithful(read('visa', tmp_path))

FOLDERS = {
 'tree': (['x/widget/train/good/0.png', 'x/widget/test/good/{0,1}.jpg', 'x/widget/test/dent/{0,1}.jpg > x/widget/ground_truth/dent/{0,1}_mask.png'], (2, 2), 2, ['widget']),
 'tree without category': (['train/good/0.png', 'test/good/{0,1}.jpg', 'test/dent/{0,1}.jpg > ground_truth/dent/{0,1}.png'], (2, 2), 2, ['root']),
 'two categories': (['{a,b}/test/ok/{0,1}.bmp', '{a,b}/test/ko/7.bmp > {a,b}/gt/ko/7.png'], (4, 2), 2, ['a', 'b']),
 'good and bad': (['good/{0,1,2}.png', 'bad/{0,1}.png > masks/bad/{0,1}.png'], (3, 2), 2, ['root']),
 'OK and NG, masks beside': (['OK/{0,1}.jpeg', 'NG/{0,1}.jpeg > NG/{0,1}_mask.png'], (2, 2), 2, ['root']),
 'kinds of defects, no masks': (['normal/{0,1}.webp', '{scratch,dent}/0.webp !'], (2, 2), 0, ['root']),
 'products of plain folders': (['{nut,bolt}/good/{0,1}.png', '{nut,bolt}/broken/5.png > {nut,bolt}/broken/masks/5.png'], (4, 2), 2, ['bolt', 'nut']),
 'heap': (['{0,1,2}.png'], (0, 0), 0, ['root']),
 'heap with masks': (['{0,1}.png', '{2,3}.png > {2,3}_mask.png', '4.png > 4_mask.png empty'], (1, 2), 2, ['root']),
 'one product on two lines': (['{line1,line2}/nut/test/good/0.png', '{line1,line2}/nut/test/bent/1.png > {line1,line2}/nut/ground_truth/bent/1_mask.png'], (2, 2), 2, ['line1/nut', 'line2/nut']),
 'pictures and masks': (['images/{0,1}.jpg > masks/{0,1}.png empty', 'images/{2,3}.jpg > masks/{2,3}.png'], (2, 2), 2, ['root']),
 'train and test, pictures and masks': (['test/images/0.jpg > test/masks/0.png empty', 'test/images/2.jpg > test/masks/2.png', 'train/images/9.jpg > train/masks/9.png empty'], (1, 1), 1, ['root']),
}

@pytest.mark.parametrize('form', FOLDERS)
def test_folder_forms(tmp_path, form):
    lines, total, masks, categories = FOLDERS[form]
    ds = load_dataset('folder', plant(tmp_path/'root', zipped(lines)))
    assert ds.total() == total and sorted(ds.categories) == categories
    assert sum(r.mask is not None for r in ds.rows if r.label) == masks
    if masks: faithful(ds)
    assert not ds.notes
    if form == 'heap': assert [r.label for r in ds.rows] == [None]*3 and ds[0].mask is None

def test_csv_of_ones_own(tmp_path):
    plant(tmp_path, ['shots/{a,b,c}.png', 'shots/d.png > marks/whatever.png'])
    (tmp_path/'list.csv').write_text('\ufeffFile;Label;Mask;Product;Phase\nshots/a.png;good;;nut;train\nshots/b.png;0;;nut;test\nshots/d.png;scratch;marks/whatever.png;nut;test\nshots/c.png;;;nut;test\nshots/c.png;;;nut;test\nshots/z.png;NG;;nut;test\n')
    ds = load_dataset('folder', tmp_path/'list.csv')
    assert ds.total() == (1, 1) and len(ds) == 3 and {p.kind for p in ds.notes} == {'left out', 'one name'}
    assert [r.defect for r in ds.rows if r.label] == ['scratch']
    faithful(ds.filter(label=1))
    assert len(Folder(tmp_path, csv=tmp_path/'list.csv')) == 4
    (tmp_path/'bad.csv').write_text('colour,size\nred,3\n')
    with pytest.raises(ConfigError, match='no column of pictures'): Folder(tmp_path/'bad.csv')

def meta(root, path=str, mask=lambda i: f'tile/ground_truth/crack/{i:03}_mask.png', splits=('train', 'test')):
    plant(root, zipped(['tile/train/good/000.png', 'tile/test/good/{000,001}.png', 'tile/test/crack/{000,001}.png > tile/ground_truth/crack/{000,001}_mask.png']))
    row = lambda p, kind, m='': dict(img_path=path(p), mask_path=m, cls_name='tile', specie_name=kind, anomaly=int(kind != 'good'))
    data = {splits[0]: {'tile': [row('tile/train/good/000.png', 'good')]}, splits[1]: {'tile': [row(f'tile/test/good/{i:03}.png', 'good') for i in (0, 1)] + [row(f'tile/test/crack/{i:03}.png', 'crack', mask(i)) for i in (0, 1)]}}
    (root/'meta.json').write_text(json.dumps(data))
    return root

@pytest.mark.parametrize('path', [str, lambda p: f'/remote-home/iot_someone/data/mvtec/{p}', lambda p: f'data/mvtec/{p}', lambda p: p.replace('/', '\\')], ids=['relative', 'absolute elsewhere', 'root twice', 'Windows'])
def test_meta_json_paths(tmp_path, path):
    ds = load_dataset('meta', meta(tmp_path, path, splits=('Train', 'Test')))
    assert ds.total() == (2, 2) and ds.filter(label=1).rows[0].defect == 'crack' and not ds.notes
    faithful(ds)

def test_meta_json_habits(tmp_path):
    ds = load_dataset('meta', meta(tmp_path/'a', mask=lambda i: f'tile/ground_truth/crack/{1 - i:03}_mask.png'))
    assert [p.kind for p in ds.notes] == ['mispaired'] and 'paired by position' in ds.notes[0].text and '2 of 2' in ds.notes[0].text
    ds = load_dataset('meta', meta(tmp_path/'b', mask=lambda i: 'never/existed.png'))
    assert not ds.has_masks and ds[3].mask is None
    ds = load_dataset('meta', meta(tmp_path/'c', mask=lambda i: ''))
    assert ds.total() == (2, 2) and not ds.has_masks
    (meta(tmp_path/'d')/'tile'/'test'/'good'/'001.png').unlink()
    ds = load_dataset('meta', tmp_path/'d')
    assert ds.total() == (1, 2) and ds.notes[0].kind == 'left out'
    (tmp_path/'d'/'meta.json').write_text('{"test": [1]}')
    with pytest.raises(ConfigError, match='not a meta.json'): Meta(tmp_path/'d')
    with pytest.raises(ConfigError, match='can be read with Folder'): Meta(tmp_path)

# ---------------------------------------------------------------- everything that can be wrong

@pytest.fixture
def tree(tmp_path):
    return plant(tmp_path/'t', zipped(['a/train/good/0.png', 'a/test/good/{0,1,2}.png', 'a/test/dent/{0,1,2,3}.png > a/ground_truth/dent/{0,1,2,3}_mask.png']))

def kinds(root, **kw): return Folder(root, **kw).filter(split='test').check()

def test_sound_tree(tree): assert list(kinds(tree)) == [] and 'nothing to report' in repr(kinds(tree))

@pytest.mark.parametrize('content', [b'', b'no picture', 'cut'])
def test_picture_that_does_not_open(tree, content):
    p = tree/'a/test/good/1.png'
    p.write_bytes(p.read_bytes()[:300] if content == 'cut' else content)
    report = kinds(tree)
    assert report.kinds() == {'picture': 1} and len(report.usable) == 6 and str(p) in repr(report)
    out = list(report.dataset.stream())
    assert [type(s) for s in out].count(Failure) == 1 and len(out) == 7
    bad = next(s for s in out if isinstance(s, Failure))
    assert '1.png' in bad.reason and '\n' not in bad.reason
    with pytest.raises(PictureError): [s for s in report.dataset]

def test_mask_of_another_size(tree):
    write(tree/'a/ground_truth/dent/0_mask.png', np.full((W, H), 255, np.uint8))
    report = kinds(tree)
    assert report.kinds() == {'mask size': 1} and len(report.unusable) == 1
    text = report[0].text
    assert f'this mask has {H} x {W} pixels, its picture {W} x {H}, turned by a right angle' in text and 'resize_masks=True' in text
    assert kinds(tree, resize_masks=True).kinds() == {}
    assert sum(isinstance(s, Failure) for s in report.dataset.stream()) == 1

def test_mask_that_does_not_open(tree):
    (tree/'a/ground_truth/dent/0_mask.png').write_bytes(b'x')
    report = kinds(tree)
    assert report.kinds() == {'mask': 1} and 'the mask does not open' in report[0].text

def test_missing_and_empty_and_contradicting_masks(tree):
    (tree/'a/ground_truth/dent/0_mask.png').unlink()
    write(tree/'a/ground_truth/dent/1_mask.png', np.zeros((H, W), np.uint8))
    report = kinds(tree)
    assert report.kinds() == {'no mask': 1, 'empty mask': 1} and not report.unusable
    assert Folder(tree).filter(label=1)[0].mask is None
    plant(tree/'k', zipped(['KolektorSDD2/test/{1,2}.png > KolektorSDD2/test/{1,2}_GT.png empty']))
    ds = read('ksdd2', tree/'k')
    write(tree/'k/KolektorSDD2/test/1_GT.png', block('x').astype(np.uint8)*255)
    assert ds.check().kinds().get('contradiction') == 1            # the mask changed after the label was read

def test_inverted_masks(tree):
    for p in (tree/'a/ground_truth').rglob('*.png'): write(p, 255 - np.asarray(Image.open(p)))
    report = kinds(tree)
    assert report.kinds() == {'inverted': 1} and 'invert_masks=True' in report[0].text
    assert kinds(tree, invert_masks=True).kinds() == {}
    faithful(Folder(tree, invert_masks=True))

@pytest.mark.parametrize('kind', ['RGB', 'RGBA', '16 bit', '16 bit small', '1 bit', 'palette', 'red', 'JPEG'])
def test_masks_of_every_kind(tree, kind):
    for p in (tree/'a/ground_truth').rglob('*.png'):
        m = np.asarray(Image.open(p)) > 0; b = m.astype(np.uint8)
        make = {'RGB': lambda: Image.fromarray(np.stack([b*255]*3, -1)), 'RGBA': lambda: Image.fromarray(np.dstack([b*0 + 255]*3 + [b*255])), '16 bit': lambda: Image.fromarray(b.astype(np.uint16)*65535),
                '16 bit small': lambda: Image.fromarray(b.astype(np.uint16)), '1 bit': lambda: Image.fromarray(m), 'palette': lambda: Image.fromarray(b).convert('P'),
                'red': lambda: Image.fromarray(np.stack([b*200, b*0, b*0], -1)), 'JPEG': lambda: Image.fromarray(b*255)}[kind]()
        if kind == 'JPEG': p.unlink(); p = p.with_suffix('.jpg')
        make.save(p)
    assert kinds(tree).kinds() == {}
    faithful(Folder(tree))

def test_two_pictures_with_one_name(tree):
    write(tree/'a/test/dent/0.jpg', np.zeros((H, W, 3), np.uint8))
    report = kinds(tree)
    assert report.kinds() == {'one name': 1, 'no mask': 2} and 'none of them gets it, so rename them' in report[0].text
    shared = plant(tree/'s', zipped(['good/0.png', '{dent,scratch}/0.png !']))
    write(shared/'masks/0.png', np.full((H, W), 255, np.uint8))
    assert 'one name' in {p.kind for p in Folder(shared).notes}

def test_one_class_and_empty_category(tree):
    plant(tree, ['b/test/good/{0,1}.png', 'c/train/good/0.png']); (tree/'d/test/good').mkdir(parents=True)
    ds = load_dataset('folder', tree)
    report = ds.check()
    assert report.kinds() == {'one class': 1, 'empty category': 2} and {p.where for p in report} == {'b', 'c', 'd'}
    assert 'AUROC is undefined' in next(p.text for p in report if p.kind == 'one class')

@pytest.mark.parametrize('loop', [lambda t: (t/'a/loop').symlink_to(t), lambda t: (t/'a/up').symlink_to(t.parent), lambda t: (t/'self').symlink_to(t/'self'), lambda t: (t/'again').symlink_to(t/'a'), lambda t: (t/'x.png').symlink_to(t/'none.png')],
                         ids=['to the root', 'above the root', 'to itself', 'the same folder twice', 'to nothing'])
def test_links(tree, loop):
    sound = Folder(tree).counts().to_dict(); loop(tree)
    ds = Folder(tree)
    assert ds.counts().to_dict() == sound
    assert [p.kind for p in ds.notes] in (['left out'], [])

def test_linked_category_is_followed(tree, tmp_path):
    (tmp_path/'store').mkdir(); (tmp_path/'view').mkdir()
    os.rename(tree/'a', tmp_path/'store/a'); (tmp_path/'view/a').symlink_to(tmp_path/'store/a')
    assert Folder(tmp_path/'view').filter(split='test').total() == (3, 4)

def test_unreadable_things_beside(tree):
    (tree/'a/test/good/Thumbs.db').write_bytes(b'x'); (tree/'a/test/good/.hidden.png').write_bytes(b'x'); (tree/'__MACOSX/a/test/good').mkdir(parents=True)
    (tree/'__MACOSX/a/test/good/._0.png').write_bytes(b'x'); (tree/'a/notes.txt').write_text('x')
    assert kinds(tree).kinds() == {}

def test_wrong_arguments(tree):
    with pytest.raises(ConfigError, match='choose one of'): Folder(tree, mask_rule='some')
    with pytest.raises(TypeError): Folder(tree, invert=True)
    with pytest.raises(ConfigError, match='has no valid pictures'): load_dataset('folder', tree, split='valid')
    with pytest.raises(ConfigError, match='say where it lies'): load_dataset('visa')
    with pytest.raises(ConfigError, match='no pictures found'): (tree/'void').mkdir() or Folder(tree/'void')
    with pytest.raises(ConfigError, match='has no category'): load_dataset('synthetic', categories='unicorn')
    with pytest.raises(IndexError): Folder(tree)[99]

# ---------------------------------------------------------------- as a dataset

def test_slices_frames_few(tree):
    ds = Folder(tree)
    assert len(ds[:2]) == 2 and len(ds[[0, -1]]) == 2 and isinstance(ds[0], Sample) and len(list(ds)) == len(ds) == 8
    assert list(ds.as_frame().columns) == ['category', 'split', 'label', 'defect', 'picture', 'mask'] and len(ds.as_frame()) == 8
    assert ds.counts().loc['a'].to_dict() == dict(good=4, defective=4, unlabelled=0, masks=4)
    assert ds.few(1).total() == (1, 1) and len(ds.paths) == 8
    assert '4 normal, 4 defective' in repr(ds) and '<table' in ds._repr_html_()
    assert ds.filter(label=0).has_masks and not ds.filter(label=0)[0].mask.any()     # a part keeps what the whole knows

class Small:
    def __call__(self, img):
        import torch
        return torch.from_numpy(np.array(img.resize((16, 16)))).permute(2, 0, 1).float()/255

@pytest.mark.parametrize('context', ['fork', 'spawn'])
def test_dataloader_workers(tree, context):
    torch = pytest.importorskip('torch')
    ds = Folder(tree).filter(split='test')
    loader = torch.utils.data.DataLoader(ds, batch_size=3, num_workers=2, multiprocessing_context=context, collate_fn=Collate(Small()))
    batches = list(loader)
    assert torch.cat([b['labels'] for b in batches]).tolist() == [r.label for r in ds.rows]
    assert batches[0]['pictures'].shape == (3, 3, 16, 16) and batches[0]['masks'].shape == (3, 16, 16) and batches[0]['masks'].dtype == torch.bool
    plain = Collate()([ds[0], ds[1]])
    assert len(plain['pictures']) == 2 and plain['masks'][0].shape == (H, W)

def test_pickle_is_small(tree):
    ds = Folder(tree)
    again = pickle.loads(pickle.dumps(ds))
    assert again.total() == ds.total() and (again[0].mask is None) == (ds[0].mask is None)
    assert all(pickle.loads(pickle.dumps(BENCHMARKS[k])).title for k in BENCHMARKS)

def test_synthetic():
    ds = Synthetic('auxiliary', per_category=2, size=64)
    assert ds.key == 'synthetic' and min(ds.total()) > 0 and ds.check().kinds() == {}
    few = Synthetic(per_category=4, size=64)
    assert few[0].mask.shape == (64, 64) and few.rows[0].split == 'test' and few.counts().masks.sum() == few.total()[1]
    assert load_dataset('synthetic', categories=few.categories[0]).total() == (20, 20)
    assert set(load_dataset('synthetic', split='auxiliary', categories=ds.categories[:1]).categories) == {ds.categories[0]}

def test_looks_inverted():
    m = [block(str(i)) for i in range(5)]
    assert not looks_inverted(m) and looks_inverted([~x for x in m]) and not looks_inverted([])
    large = np.zeros((H, W), bool); large[4:-4, 4:-4] = True
    assert not looks_inverted([large])                              # large, but not along the rim

def test_read_mask_rules(tmp_path):
    m = block('x'); Image.fromarray(m.astype(np.uint8)*255).save(tmp_path/'m.jpg', quality=60); Image.fromarray(m.astype(np.uint8)*3).save(tmp_path/'m.png')
    assert (read_mask(tmp_path/'m.jpg') == m).mean() > .99 and read_mask(tmp_path/'m.jpg', 'nonzero').sum() > m.sum()
    assert (read_mask(tmp_path/'m.png') == m).all() and not read_mask(tmp_path/'m.png', 'half').any()
    with pytest.raises(PictureError, match='no such mask'): read_mask(tmp_path/'none.png')

def test_import_is_light():
    code = "import sys, zsad_nb.datasets; print([m for m in ('torch', 'pandas', 'matplotlib', 'sklearn') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'

def test_registry():
    assert {*BENCHMARKS, 'folder', 'meta', 'synthetic'} == set(READERS)
    assert 'KSDD' in repr(READERS) and '<table' in READERS._repr_html_() and len(READERS.frame()) == 23
    for d in BENCHMARKS.values(): assert d.source.startswith('http') and d.licence and d.expected() and '<table' in d._repr_html_()

needs_shared = pytest.mark.skipif(shared_dir() is None, reason='the real pictures of ../shared are not here')

@needs_shared
def test_magnetic_tile():
    ds = load_dataset('folder', shared_dir()/'data'/'magnetic_tile')
    assert ds.total() == (381, 388) and ds.categories == ['magnetic_tile'] and not ds.notes
    assert ds.filter(label=1).as_frame().defect.value_counts().to_dict() == dict(blowhole=115, uneven=99, **{'break': 85}, crack=57, fray=32)
    assert load_dataset('folder', shared_dir()/'data'/'magnetic_tile', split='train').total() == (571, 0)
    assert ds.few(20).check().kinds() == {}

@needs_shared
def test_crackforest():
    ds = load_dataset('folder', shared_dir()/'data'/'crackforest')
    assert ds.total() == (8, 118) and ds.categories == ['road_crack'] and all(r.mask for r in ds.rows if r.label)
    assert [(p.kind, p.where) for p in ds.notes] == [('left out', 'unlabelled')] and ds.notes[0].text.startswith('29 pictures')
    assert set(ds.check().kinds()) == {'left out'}
