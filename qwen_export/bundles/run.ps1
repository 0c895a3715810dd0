# Runs the bundle: .\run.ps1 "Why is the sky blue?" --chat
# The first run sets up an environment beside this file, from wheels\ where it is there, else from the network.
$ErrorActionPreference = 'Stop'
$version = 'PYVERSION'
$here = $PSScriptRoot

$long = (Get-ItemProperty 'HKLM:\SYSTEM\CurrentControlSet\Control\FileSystem' -ErrorAction SilentlyContinue).LongPathsEnabled
if ($here.Length -gt 100 -and $long -ne 1) {
    throw "The path $here is too long for Windows without long paths. Move this folder, for example to C:\qwen."
}

# Text of pipes is UTF-8 in both directions. A process without a console, such as a service, has no encoding of it to set.
$OutputEncoding = [System.Text.UTF8Encoding]::new($false)
try { [Console]::OutputEncoding = $OutputEncoding } catch { Write-Verbose "no console: $_" }

# From here on programs run, and exit codes count: Windows PowerShell takes a line on stderr for an error where stderr is redirected.
$ErrorActionPreference = 'Continue'
$folder = Join-Path $here 'env'
$python = Join-Path $folder 'Scripts\python.exe'
$ready = Join-Path $folder 'ready'
if (-not (Test-Path -LiteralPath $ready)) {
    $wanted = "Python $version is needed: winget install Python.Python.$version"
    if (-not (Get-Command py -ErrorAction SilentlyContinue)) { throw $wanted }
    & py "-$version" -I -m venv $folder
    if ($LASTEXITCODE) { throw $wanted }
    $wheels = Join-Path $here 'wheels'
    $source = @(if (Test-Path -LiteralPath $wheels) { '--no-index'; '--find-links'; $wheels })
    & $python -I -X utf8 -m pip install --disable-pip-version-check --quiet @source -r (Join-Path $here 'requirements.txt')
    if ($LASTEXITCODE) { throw 'The packages could not be installed.' }
    [System.IO.File]::WriteAllText($ready, $version)
}

# Not on the command line, where Windows PowerShell loses quotes within an argument and arguments that are empty.
$env:QWEN_EXPORT_ARGUMENTS = ConvertTo-Json -Compress -InputObject @($args | ForEach-Object { "$_" })
$app = Join-Path $here 'app'
if ($MyInvocation.ExpectingInput) { $input | & $python -I -X utf8 $app } else { & $python -I -X utf8 $app }
exit $LASTEXITCODE
