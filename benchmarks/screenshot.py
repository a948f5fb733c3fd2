"""A page of HTML as a picture: python -m benchmarks.screenshot PAGE PICTURE. Needs `pip install PyQt6-WebEngine`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

WIDTH, HEIGHT = 1180, 800
DRAWN_MS = 1500  # for the page's own script, after it was loaded


def screenshot(page: Path, picture: Path) -> None:
    """Writes a PNG of the top of the page, as a browser draws it. Raises SystemExit where it cannot be drawn."""
    os.environ["QT_QPA_PLATFORM"] = "offscreen"
    os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = "--disable-gpu --no-sandbox --hide-scrollbars"
    from PyQt6.QtCore import Qt, QTimer, QUrl
    from PyQt6.QtGui import QImage
    from PyQt6.QtWebEngineCore import QWebEngineSettings
    from PyQt6.QtWebEngineWidgets import QWebEngineView
    from PyQt6.QtWidgets import QApplication

    application = QApplication(sys.argv[:1])
    view = QWebEngineView()
    view.resize(WIDTH, HEIGHT)

    settings = view.settings()
    assert settings is not None
    settings.setAttribute(QWebEngineSettings.WebAttribute.ShowScrollBars, False)

    def draw() -> None:
        image = (
            view.grab().toImage().convertToFormat(QImage.Format.Format_Indexed8, Qt.ImageConversionFlag.ThresholdDither)
        )
        application.exit(0 if image.save(str(picture)) else 1)

    view.loadFinished.connect(lambda _: QTimer.singleShot(DRAWN_MS, draw))
    view.load(QUrl.fromLocalFile(str(page.resolve())))
    view.show()
    if application.exec():
        raise SystemExit(f"{page} could not be drawn")


if __name__ == "__main__":
    screenshot(Path(sys.argv[1]), Path(sys.argv[2]))
