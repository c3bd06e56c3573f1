"Draw the pictures under examples/: things of the target split, which no model in this package was trained on"
from pathlib import Path
from PIL import Image
from zsad_nb.synthetic import render

SCENES = [('bearing', 11, None), ('bearing', 11, 'crack'), ('bottle_cap', 3, 'paint'), ('capsule', 2, None), ('capsule', 2, 'hole'),
          ('cork', 5, 'thread'), ('screw', 4, None), ('tile', 7, None), ('tile', 7, 'stain'), ('wicker', 6, 'burn')]

def draw(folder):
    "Write one JPEG a scene"
    folder.mkdir(exist_ok=True)
    for category, address, defect in SCENES:
        picture = render(category, 1, address, defect, seed=2, size=256)
        Image.fromarray(picture.images[0]).save(folder/f'{category}_{defect or "good"}.jpg', quality=92)

if __name__ == '__main__': draw(Path(__file__).resolve().parent.parent/'examples')
