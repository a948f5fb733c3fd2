"""A page of HTML as a picture: python -m benchmarks.screenshot PAGE PICTURE. Needs `pip install PyQt6-WebEngine`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

WIDTH, HEIGHT = 1180, 1000
DRAWN_MS = 1500  # for the page's own script, after it was loaded


def screenshot(page: Path, picture: Path) -> None:
    """Writes a PNG of the top of the page, as a browser draws it. Raises SystemExit where it cannot be drawn."""
    os.environ["QT_QPA_PLATFORM"] = "offscreen"
    os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = "--disable-gpu --no-sandbox --hide-scrollbars"
    from PyQt6.QtCore import QTimer, QUrl
    from PyQt6.QtWebEngineWidgets import QWebEngineView
    from PyQt6.QtWidgets import QApplication

    application = QApplication(sys.argv[:1])
    view = QWebEngineView()
    view.resize(WIDTH, HEIGHT)

    def draw() -> None:
        is_saved = view.grab().save(str(picture))
        application.exit(0 if is_saved else 1)

    view.loadFinished.connect(lambda _: QTimer.singleShot(DRAWN_MS, draw))
    view.load(QUrl.fromLocalFile(str(page.resolve())))
    view.show()
    if application.exec():
        raise SystemExit(f"{page} could not be drawn")


if __name__ == "__main__":
    screenshot(Path(sys.argv[1]), Path(sys.argv[2]))
