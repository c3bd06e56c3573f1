"Package description; everything that changes lives in settings.ini"
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).resolve().parent
ini = ConfigParser(delimiters=['='])
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
readme = here/'README.md'
stages = {'1': '1 - Planning', '2': '2 - Pre-Alpha', '3': '3 - Alpha', '4': '4 - Beta', '5': '5 - Production/Stable'}
pythons = [f'3.{n}' for n in range(int(cfg['min_python'].split('.')[1]), 14)]
extras = [k.removesuffix('_requirements') for k in cfg if k.endswith('_requirements')]

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else cfg['description'], long_description_content_type='text/markdown',
    author=cfg['author'], author_email=cfg['author_email'], license='Apache-2.0', url=f"https://github.com/{cfg['user']}/{cfg['repo']}",
    keywords=cfg['keywords'], python_requires=f">={cfg['min_python']}",
    classifiers=[f'Development Status :: {stages[cfg["status"]]}', f'Intended Audience :: {cfg["audience"]}', f'Natural Language :: {cfg["language"]}',
                 'Topic :: Scientific/Engineering :: Image Recognition', *(f'Programming Language :: Python :: {v}' for v in pythons)],
    packages=find_packages(include=[cfg['lib_path'], f"{cfg['lib_path']}.*"]), include_package_data=True, zip_safe=False,
    install_requires=cfg['requirements'].split(), extras_require={e: cfg[f'{e}_requirements'].split() for e in extras},
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]},
)
