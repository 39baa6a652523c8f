"""Writes the generated parts of README.md, README.es.md, docs/architecture.md and docs/recipe.md.

    python docs/generate.py

A generated part is the text between the lines `<!-- NAME -->` and `<!-- end of NAME -->` of a page. The flag table comes
from trainer/config.py, the file tree from the docstrings under trainer/, the drawing and the packages from the imports there,
the tables of recipes from docs/recipe/.
"""

import ast
import functools
import pathlib
from collections.abc import Callable

import recipe  # of this folder

from trainer.config import DEFAULTS, FLAG_INFO

ROOT = pathlib.Path(__file__).parents[1]
TRAINER = ROOT / "trainer"
# The order in which the file tree lists the modules and packages of trainer/. Others come last.
COMMANDS = ["task", "predict", "evaluate", "report", "inspect_data", "tune", "benchmark", "serve", "pack"]
PACKAGES = ["storage", "runtime", "data", "models", "artifacts", "training", "serving", "reporting", "benchmarks"]
_MODULES = (
    "api",
    "job",
    "job_results",
    "prepared_job",
    "config",
    "flag_info",
    "recipes",
    "earlier_runs",
    "cli",
    "errors",
    "formatting",
)
READING_ORDER = ["__main__", *COMMANDS, *_MODULES, *PACKAGES]
# Almost every module imports these two, so that arrows to them would hide the others.
NOT_DRAWN = {"errors", "formatting"}

# The rest of the project, with the purpose of each file and folder: English, Spanish.
PROJECT = {
    "deploy/": (
        "Vertex AI, Kubernetes and image specifications, flag files, and their README",
        "especificaciones de Vertex AI, Kubernetes y la imagen, archivos de opciones, y su README",
    ),
    "docs/": (
        "tutorial, notebook, architecture, trackers, image formats, buckets, choice of the defaults, benchmark, screenshots, "
        "and scripts",
        "tutorial, cuaderno, arquitectura, seguimiento, formatos de imagen, buckets, elección de los valores, medidas, "
        "capturas y scripts",
    ),
    "scripts/": (
        "fresh_check: `make demo` and `make test` in a fresh clone; gpu_check: one page on a GPU; audit: vulnerabilities",
        "fresh_check: `make demo` y `make test` en una copia nueva; gpu_check: una página sobre la GPU; audit: fallos",
    ),
    "tests/": (
        "one test file per module, in the same folders as trainer/; whole jobs in end_to_end/, helpers in support/",
        "un archivo por módulo, en las mismas carpetas que trainer/; trabajos completos en end_to_end/, ayudas en support/",
    ),
    "Makefile": (
        "demo, test, check, format, lock, audit, coverage",
        "demo, test, check, format, lock, audit, coverage",
    ),
    "Dockerfile": ("the image for CPU and GPU", "la imagen para CPU y GPU"),
    "cloudbuild.yaml": (
        "Cloud Build: tests, builds and pushes the image",
        "Cloud Build: prueba, construye y publica la imagen",
    ),
    "setup.py": ("the package, its dependencies and extras", "el paquete, sus dependencias y extras"),
    "constraints.txt": ("the exact versions that are tested", "las versiones exactas que se prueban"),
    "pyproject.toml": ("settings of ruff, pytest, coverage and mypy", "ajustes de ruff, pytest, coverage y mypy"),
    "CONTRIBUTING.md": ("how to check a change; dependencies", "cómo comprobar un cambio; dependencias"),
    "CHANGELOG.md": ("what changed for users", "los cambios que notan los usuarios"),
    "README.md": ("this page", "esta página en inglés"),
    "README.es.md": ("this page in Spanish", "esta página"),
    "LICENSE": ("Apache-2.0", "Apache-2.0"),
}

SPANISH_TRAINER = {
    "__main__.py": "inicia una orden por su nombre: `picture-trainer train`",
    "task.py": "entrena un clasificador con una carpeta de imágenes y lo exporta",
    "predict.py": "etiqueta imágenes: archivos, carpetas, rutas gs://",
    "evaluate.py": "evalúa uno o varios modelos con una carpeta etiquetada",
    "report.py": "vuelve a dibujar el informe de un trabajo",
    "inspect_data.py": "busca errores en una carpeta antes de entrenar",
    "tune.py": "busca buenos valores de las opciones",
    "benchmark.py": "mide este proyecto frente a las alternativas",
    "serve.py": "sirve un modelo por HTTP",
    "pack.py": "empaqueta archivos pequeños en fragmentos TFRecord",
    "api.py": "las órdenes como funciones de Python, para cuadernos y otros programas",
    "job.py": "el trabajo completo: de los datos preparados al modelo exportado y al informe",
    "job_results.py": "lo que escribe un trabajo: sus archivos y el modelo exportado",
    "prepared_job.py": "los valores de un trabajo, preparados por un comando",
    "config.py": "la configuración; cada campo es una opción",
    "earlier_runs.py": "la configuración de una ejecución anterior, comparada con la actual",
    "flag_info.py": "lo que un campo de la configuración dice de su opción",
    "recipes.py": "--recipe: cuántas épocas se ajusta la red entera, y la receta del artículo",
    "cli.py": "lo común a todas las órdenes: opciones, registro, códigos de salida",
    "errors.py": "los errores que el usuario puede corregir, y los demás",
    "formatting.py": "números, duraciones y textos, en inglés o en español",
    "storage/": "archivos locales y en buckets: escritura atómica, reintentos, bloqueo de job_dir",
    "runtime/": "dónde corre el trabajo: máquinas, dispositivos, diagnóstico de la GPU, señales",
    "data/": "de una carpeta de imágenes a lotes: listado, comprobación, partición, decodificación",
    "models/": "la red: una base con su cabeza, los pesos y Grad-CAM",
    "artifacts/": "los archivos de job_dir y las métricas que contienen",
    "training/": "pasos de entrenamiento, etapas, puntos de control y reanudación",
    "serving/": "exportación comprobada, predicción y servidor HTTP",
    "reporting/": "lo que lee una persona: plan, informe, gráficos, TensorBoard, ficha del modelo",
    "benchmarks/": "las medidas que hace trainer.benchmark",
}

SPANISH_FLAGS = {
    "labels": "Archivo de rutas y etiquetas, en lugar de carpetas por clase: CSV con las columnas path,label y quizá "
    "split,group; el archivo de importación de Vertex AI (CSV o JSON Lines); el CSV que exporta Label Studio. Las rutas son "
    "relativas a --data_dir (si falta, a la carpeta del archivo), absolutas o gs://.",
    "test_split": "Parte de cada clase que se aparta para la prueba, por contenido, antes que nada. Ni el entrenamiento ni "
    "ninguna elección la usa; el modelo exportado se evalúa con ella una vez, al final.",
    "image_size": "Alto y ancho en píxeles de la entrada de la red; 32 o más.",
    "resize": "Cómo se hace cuadrada una imagen. stretch: sin conservar la proporción; pad: toda la imagen, con márgenes; "
    "crop: su cuadrado central. Igual al entrenar, exportar y servir.",
    "weights": "imagenet (Keras los descarga), none (aleatorios), o la ruta de un archivo de pesos de la red base o de un "
    "trabajo anterior.",
    "backbone": "La red base, bajo la cabeza, de keras.applications: ResNet50, ResNet101, EfficientNetV2B0, ConvNeXtTiny o "
    "MobileNetV3Large. Más pequeñas y rápidas que ResNet50: MobileNetV3Large, EfficientNetV2B0.",
    "recipe": "Qué se entrena, en una palabra. head: solo la cabeza; finetune: después la red entera; auto: finetune en una "
    "GPU si dura menos de una hora, si no head; article: la receta del artículo. Cualquier otra opción prevalece.",
    "batch_size": "Imágenes por paso entre todas las máquinas y dispositivos (el lote global).",
    "head_epochs": "Épocas de la cabeza sola, sobre características que se calculan una vez. -1: hasta el óptimo, por "
    "regresión logística o, en carpetas muy grandes, 15 épocas.",
    "epochs": "Épocas de ajuste de la red entera, después de la cabeza. -1: las que decide --recipe.",
    "learning_rate": "Tasa de aprendizaje máxima del ajuste. Con lamb es relativa: el mayor cambio de una capa en un paso, "
    "como fracción de sus pesos.",
    "class_weight": "balanced: los ejemplos de clases escasas pesan más en la pérdida.",
    "early_stopping_patience": "Termina una etapa tras este número de épocas sin mejorar --monitor; 0: nunca.",
    "precision": "auto: la precisión que el dispositivo calcula rápido; float32, mixed_float16, mixed_bfloat16.",
    "require_gpu": "Termina con el código 2 y un diagnóstico si TensorFlow no ve ninguna GPU.",
    "language": "Idioma del informe: en (inglés) o es (español).",
    "export_formats": "Separados por comas: saved_model, que siempre se escribe; y tflite, onnx, tflite_float16 (la mitad del "
    "tamaño) y tflite_int8 (la cuarta parte, para procesadores de enteros), que van a exports/ en job_dir.",
}


def flag_table(*, is_spanish: bool = False) -> str:
    """The flags that README lists, in the order of Config, with their defaults."""
    rows = ["| opción | por defecto | qué |" if is_spanish else "| flag | default | what |", "| --- | --- | --- |"]
    for name, info in FLAG_INFO.items():
        if info.in_readme:
            text = SPANISH_FLAGS[name] if is_spanish else _english_help(name)
            default = DEFAULTS[name]
            rows.append(f"| `--{name}` | {str(default).lower() if isinstance(default, bool) else default} | {text} |")
    return "\n".join(rows)


def _english_help(name: str) -> str:
    """The help text of a flag, and its choices where the text does not name them."""
    info = FLAG_INFO[name]
    unnamed = [choice for choice in info.choices if choice not in info.help and choice != DEFAULTS[name]]
    return info.help + (f" Other choices: {', '.join(unnamed)}." if unnamed else "")


def file_tree() -> str:
    """Every module under trainer/ with the first line of its docstring, then the rest of the project.

    A package shows the docstring of its __init__.py.
    """
    lines = [("trainer/", _purpose(TRAINER / "__init__.py"))]
    for path in _in_reading_order(TRAINER):
        if path.is_file():
            lines.append((f"  {path.name}", _purpose(path)))
            continue
        lines.append((f"  {path.name}/", _purpose(path / "__init__.py")))
        for inner in _in_reading_order(path):
            if inner.is_dir():
                lines.append((f"    {inner.name}/", ", ".join(sorted(file.name for file in inner.iterdir()))))
            else:
                lines.append((f"    {inner.name}", _purpose(inner)))
    return _as_tree([*lines, *((name, english) for name, (english, _) in PROJECT.items())])


def spanish_file_tree() -> str:
    """The commands and the packages of trainer/, then the rest of the project."""
    names = [f"{path.name}/" if path.is_dir() else path.name for path in _in_reading_order(TRAINER)]
    lines = [("trainer/", "el código"), *((f"  {name}", SPANISH_TRAINER[name]) for name in names)]
    return _as_tree([*lines, *((name, spanish) for name, (_, spanish) in PROJECT.items())])


def _as_tree(lines: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in lines) + 2
    return "\n".join(["```", *(f"{name:{width}}{text}" for name, text in lines), "```"])


def _in_reading_order(directory: pathlib.Path) -> list[pathlib.Path]:
    def position(path: pathlib.Path) -> tuple[int, bool, str]:
        rank = READING_ORDER.index(path.stem) if directory == TRAINER and path.stem in READING_ORDER else 1000
        return rank, path.is_dir(), path.name

    found = [path for path in directory.iterdir() if path.suffix == ".py" or path.is_dir()]
    return sorted((path for path in found if path.name not in ("__init__.py", "__pycache__")), key=position)


def _purpose(path: pathlib.Path) -> str:
    """The first line of a module's docstring. Raises ValueError if there is none."""
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    if not docstring:
        raise ValueError(f"{path} has no docstring: write one, as the file tree of README.md shows its first line.")
    return docstring.splitlines()[0]


@functools.cache
def package_imports() -> dict[str, set[str]]:
    """For each package, top module and the commands together: the others that it imports, also inside functions."""
    imports = {"__main__": {"commands"}}  # by name, when it starts one
    for path in sorted(TRAINER.rglob("*.py")):
        if path == TRAINER / "__init__.py":
            continue
        importing = _room(".".join(path.relative_to(ROOT).with_suffix("").parts))
        imported = imports.setdefault(importing, set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "trainer":
                imported |= {_room(f"{node.module}.{alias.name}") for alias in node.names} - {importing}
    return imports


def _room(module: str) -> str:
    """`data` for trainer.data.splits or trainer.data.splits.choose, `commands` for trainer.task."""
    name = module.split(".")[1]
    return "commands" if name in COMMANDS else name


def _reachable(package: str) -> set[str]:
    """The packages that `package` imports, directly or through others."""
    return {below for imported in package_imports()[package] for below in {imported} | _reachable(imported)}


def drawing() -> str:
    """The imports between packages as Mermaid, without the arrows that follow from others."""
    lines = ["```mermaid", "flowchart TD"]
    for package in sorted(package_imports(), key=_position):
        imported = package_imports()[package]
        indirect = {below for other in imported for below in _reachable(other)}
        lines += [f"    {package} --> {other}" for other in sorted(imported - indirect - NOT_DRAWN, key=_position)]
    return "\n".join([*lines, "```"])


def layer_table() -> str:
    """The packages from the top layer to the lowest one. A layer is one above the highest that its packages import."""

    def level(package: str) -> int:
        return max((level(imported) + 1 for imported in package_imports()[package]), default=0)

    rows = ["| layer | packages and modules | what they import |", "| --- | --- | --- |"]
    for number in range(max(map(level, package_imports())), -1, -1):
        packages = sorted((package for package in package_imports() if level(package) == number), key=_position)
        for row, package in enumerate(packages):
            imported = ", ".join(sorted(package_imports()[package], key=_position)) or "nothing of the project"
            rows.append(f"| {'' if row else number} | {_link(package)} | {imported} |")
    return "\n".join(rows)


def _position(package: str) -> int:
    return ["__main__", "commands", *READING_ORDER].index(package)


def _link(package: str) -> str:
    if package == "commands":
        return f"commands: {', '.join(f'`{name}`' for name in COMMANDS)}"
    name = f"{package}/" if (TRAINER / package).is_dir() else f"{package}.py"
    return f"[`{name}`](../trainer/{name})"


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"flags": flag_table, "files": file_tree},
    "README.es.md": {"flags": functools.partial(flag_table, is_spanish=True), "files": spanish_file_tree},
    "docs/architecture.md": {"drawing": drawing, "layers": layer_table},
    "docs/recipe.md": {"heads": recipe.heads_table, "recipes": recipe.recipes_table},
}


def with_generated_parts(page: str, text: str) -> str:
    """`text` of the page with its generated parts replaced. Raises ValueError if a marker is missing."""
    for name, generate in PAGES[page].items():
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise ValueError(f"{page} has no or several {start.strip()} ... {end}: it needs each once.")
        before, _, after = text.partition(start)
        text = f"{before}{start}{generate()}\n{end}{after.partition(end)[2]}"
    return text


if __name__ == "__main__":
    for page in PAGES:
        path = ROOT / page
        path.write_text(with_generated_parts(page, path.read_text()))
