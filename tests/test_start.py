"What starting costs: which modules an import pulls in. Seconds depend on the machine (`zsad bench import` measures them), names of modules do not"
import json, subprocess, sys
import pytest

HEAVY = {'torch', 'open_clip', 'timm', 'transformers', 'tokenizers', 'huggingface_hub', 'sklearn', 'scipy', 'pandas', 'matplotlib', 'plotly', 'IPython', 'ipywidgets', 'nbdev'}


def loaded(code, before='pass'):
    "Top-level modules that `code` loads in a fresh Python, those that `before` had loaded left out"
    code = f'import json, sys\n{before}\nthere = set(sys.modules)\n{code}\nprint(); print(json.dumps(sorted({{m.split(".")[0] for m in set(sys.modules) - there}})))'
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))

@pytest.mark.parametrize('code', [
    'import zsad_nb',
    'import zsad_nb.cli',
    'import zsad_nb.bench',
    'from zsad_nb.cli import main; assert main(["--help"]) == 0',
    'from zsad_nb.cli import main; assert main(["--version"]) == 0',
    'from zsad_nb.cli import main; assert main(["predict", "--help"]) == 0',
    'from zsad_nb.cli import main; assert main(["bench", "--help"]) == 0',
    'from zsad_nb.cli import main; assert main(["nonsense"]) == 2',
    'from zsad_nb.cli import main; assert main(["predict", "nothing_here.png", "--quiet"]) == 1',
    'import zsad_nb.types, zsad_nb.pictures, zsad_nb.synthetic, zsad_nb.viz',
])
def test_light(code):
    assert not loaded(code) & HEAVY

def test_the_package_itself_is_nearly_nothing():
    assert loaded('import zsad_nb') == {'zsad_nb'}

def test_anovl_needs_torch_and_little_else():
    "Beyond torch and open_clip, importing a method loads none of the heavy libraries"
    more = loaded('from zsad_nb.anovl import AnoVL', before='import torch, open_clip')
    assert 'zsad_nb' in more and not more & HEAVY
