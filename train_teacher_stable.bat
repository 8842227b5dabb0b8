@echo off
rem Train the teacher under the stable settings; arguments go to "python -m fastguard.train".
rem Makes .venv beside this file if there is none.
setlocal
cd /d "%~dp0"
if not exist .venv\Scripts\python.exe (
    python -m venv .venv || exit /b 1
)
.venv\Scripts\python -c "import fastguard" 2>nul || .venv\Scripts\python -m pip install -e . || exit /b 1
.venv\Scripts\python -m fastguard.train --model teacher --stable %*
