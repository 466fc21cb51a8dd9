//! Packed copies of weights on disk: written once, mapped from then on, refused when damaged, shared.

#[allow(dead_code, reason = "the other tests need more of it")]
mod session;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Barrier,
    thread,
};

use baton_checkpoint::Checkpoint;
use baton_runtime::{BlockId, Executor, LoadOptions, SequenceChunk, load};
use session::{smollm2, tiny};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

const PROMPT: [u32; 5] = [1, 93, 198, 83, 259];

fn options(folder: Option<&Path>) -> LoadOptions {
    let packed_copies = folder.map(Path::to_owned);
    LoadOptions { threads: 2, kv_blocks: 8, packed_copies, ..LoadOptions::default() }
}

fn open(model: &Path, folder: Option<&Path>) -> Box<dyn Executor> {
    load(&Checkpoint::open(model).unwrap(), &options(folder), &mut |_, _| {}).unwrap()
}

fn logits(executor: &mut dyn Executor) -> Vec<f32> {
    let chunk = SequenceChunk { tokens: &PROMPT, start: 0, blocks: &[BlockId(3)], logits: true };
    executor.forward(&[chunk], &mut |_| {}).unwrap().rows().next().unwrap().to_vec()
}

/// Files of a folder whose names end so.
fn files(folder: &Path, ending: &str) -> Vec<PathBuf> {
    let all = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    all.filter(|path| path.to_str().unwrap().ends_with(ending)).collect()
}

fn the_copy(folder: &Path) -> PathBuf {
    let copies = files(folder, ".packed");
    assert_eq!(copies.len(), 1, "{copies:?}");
    copies[0].clone()
}

#[test]
fn a_model_from_its_copy_is_the_same() {
    // Grouped heads with biases, and a mixture of experts over latents, whose projections are loaded head by head.
    for model in [
        smollm2(),
        tiny("hf-bf16-qwen2-ratio8-tied"),
        tiny("hf-bf16-deepseek3-yarn-mtp"),
        tiny("hf-f8-deepseek3"),
    ] {
        let folder = TempDir::new().unwrap();
        let in_memory = logits(open(&model, None).as_mut());
        let written = logits(open(&model, Some(folder.path())).as_mut());
        let copy = the_copy(folder.path());
        let before = fs::metadata(&copy).unwrap();
        assert!(files(folder.path(), ".part").is_empty());
        let mapped = logits(open(&model, Some(folder.path())).as_mut());
        assert!(in_memory == written && in_memory == mapped, "{}", model.display());
        let after = fs::metadata(&copy).unwrap();
        #[cfg(unix)]
        {
            use std::os::unix::fs::MetadataExt;
            assert_eq!((before.ino(), before.len()), (after.ino(), after.len()), "written once");
            assert_eq!(after.mode() & 0o777, 0o600);
        }
    }
}

#[test]
fn whatever_is_damaged_is_written_anew() {
    let (model, folder) = (tiny("hf-bf16-qwen2-ratio8-tied"), TempDir::new().unwrap());
    let want = logits(open(&model, Some(folder.path())).as_mut());
    let copy = the_copy(folder.path());
    let whole = fs::read(&copy).unwrap();
    let middle = whole.len() / 2;
    let changed = |at: usize| {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        bytes
    };
    let damages = [
        ("a weight", changed(middle)),
        ("the last byte that counts", changed(whole.len() - 64)),
        ("the first digest", changed(64)),
        ("the first length", changed(64 + 32)),
        ("the key", changed(40)),
        ("cut short", whole[..middle].to_vec()),
        ("cut within the header", whole[..10].to_vec()),
        ("empty", Vec::new()),
    ];
    for (damage, bytes) in damages {
        fs::write(&copy, bytes).unwrap();
        let got = logits(open(&model, Some(folder.path())).as_mut());
        assert!(got == want, "{damage}");
        assert!(fs::read(&copy).unwrap() == whole, "{damage}: not written anew");
    }
    // As a process that was killed leaves it.
    fs::remove_file(&copy).unwrap();
    fs::write(copy.with_extension("1-1.part"), &whole[..middle]).unwrap();
    assert!(logits(open(&model, Some(folder.path())).as_mut()) == want);
    assert!(fs::read(&copy).unwrap() == whole);
}

#[test]
fn what_is_packed_otherwise_has_a_copy_of_its_own() {
    let folder = TempDir::new().unwrap();
    // Weights in bf16.
    let checkpoint = Checkpoint::open(&tiny("hf-bf16-mistral")).unwrap();
    for exact_bf16 in [false, true, false] {
        let options = LoadOptions { exact_bf16, ..options(Some(folder.path())) };
        load(&checkpoint, &options, &mut |_, _| {}).unwrap();
    }
    assert_eq!(files(folder.path(), ".packed").len(), 2);
    open(&tiny("hf-bf16-qwen2-ratio8-tied"), Some(folder.path()));
    assert_eq!(files(folder.path(), ".packed").len(), 3);
}

#[test]
fn where_no_copy_can_be_the_model_is_in_memory() {
    let (model, folder) = (tiny("hf-bf16-qwen2-ratio8-tied"), TempDir::new().unwrap());
    let want = logits(open(&model, None).as_mut());
    let file = folder.path().join("file");
    fs::write(&file, "no folder").unwrap();
    assert!(logits(open(&model, Some(&file)).as_mut()) == want);
    assert_eq!(fs::read(&file).unwrap(), b"no folder");
}

#[test]
fn of_several_that_load_at_once_one_writes() {
    let (model, folder) = (smollm2(), TempDir::new().unwrap());
    let barrier = Barrier::new(3);
    let mut executors: Vec<Box<dyn Executor>> = thread::scope(|scope| {
        let load = || {
            barrier.wait();
            open(&model, Some(folder.path()))
        };
        let threads: Vec<_> = (0..3).map(|_| scope.spawn(load)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    // Had another written one, too, whoever came first would still have a file without a name.
    #[cfg(target_os = "linux")]
    {
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let copies = maps.lines().filter(|line| line.contains(folder.path().to_str().unwrap()));
        assert_eq!(copies.clone().filter(|line| line.ends_with(".packed")).count(), 3);
        assert_eq!(copies.count(), 3, "{maps}");
    }
    let results: Vec<Vec<f32>> = executors.iter_mut().map(|executor| logits(executor.as_mut())).collect();
    assert!(results[0] == results[1] && results[0] == results[2]);
    the_copy(folder.path());
    assert!(files(folder.path(), ".part").is_empty());
}

/// A copy must be what this version would write: if this fails because the arrangement of weights has changed, or the order
/// in which models load them, then `VERSION` in `weights/copy.rs` has to change with the digest here.
#[test]
fn a_version_of_copies_is_one_arrangement() {
    let mut all = Sha256::new();
    for model in ["hf-bf16-qwen2-ratio8-tied", "hf-f8-deepseek3", "gguf-q4_k-q5_k-q6_k", "gguf-q8_0-qwen3moe"]
    {
        let folder = TempDir::new().unwrap();
        open(&tiny(model), Some(folder.path()));
        // Behind the key, which is of these files and when they were changed.
        all.update(&fs::read(the_copy(folder.path())).unwrap()[64..]);
    }
    let digest: String = all.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(digest, "6287c72d4e0789a5de91c86ad23c864036e8045e24f03c739288408d7bc03582");
}

/// Kilobytes of this process's mappings of a file, as resident and as this process's share.
#[cfg(target_os = "linux")]
fn mapped(path: &Path) -> (u64, u64) {
    let (mut resident, mut share, mut counts) = (0, 0, false);
    for line in fs::read_to_string("/proc/self/smaps").unwrap().lines() {
        let mut words = line.split_whitespace();
        let (first, number) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
        match first {
            "Rss:" if counts => resident += number.parse::<u64>().unwrap(),
            "Pss:" if counts => share += number.parse::<u64>().unwrap(),
            _ if first.ends_with(':') => {}
            _ => counts = line.ends_with(path.to_str().unwrap()),
        }
    }
    (resident, share)
}

#[cfg(target_os = "linux")]
#[test]
fn all_that_map_a_copy_share_its_memory() {
    let (model, folder) = (smollm2(), TempDir::new().unwrap());
    let weights = Checkpoint::open(&model).unwrap().weight_bytes() / 1024;
    drop(open(&model, Some(folder.path())));
    let executors: Vec<_> = (0..3).map(|_| open(&model, Some(folder.path()))).collect();
    let (resident, share) = mapped(&the_copy(folder.path()));
    assert!(resident > 3 * weights * 9 / 10, "{resident} kB of three times {weights} kB");
    assert!(share < weights * 11 / 10, "{share} kB for {weights} kB");
    drop(executors);
}
