//! How fast prompts become tokens, beside Hugging Face's `tokenizers`, and answers text again.
//!
//! `cargo bench -p baton-coordinator --bench text -- --tokenizers FOLDER --model FILE`: FOLDER holds folders with a
//! `tokenizer.json` each, as `BATON_TEST_TOKENIZERS` does; FILE is a model with a chat template, through which whole
//! requests go. One thread, best of several rounds that take turns.

use std::{
    fs,
    hint::black_box,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use baton_checkpoint::ModelRoot;
use baton_coordinator::{
    config::ModelConfig,
    prepare::{Endpoint, RequestLimits, Served, parse, prepare},
    text::{Detokenizer, TextCache, TokenTexts, Tokenizer},
};
use baton_schedule::chains::{Chains, Dialect, KnownStrides};
use clap::Parser;
use tabled::{
    builder::Builder,
    settings::{Alignment, Style, object::Columns},
};
use tokenizers::Tokenizer as Tables;

type Error = Box<dyn std::error::Error + Send + Sync>;

const LONG_BYTES: usize = 220_000;
const CACHE_BYTES: usize = 64 << 20;

#[derive(Parser)]
struct Args {
    /// Folder of folders with a `tokenizer.json` each.
    #[arg(long, env = "BATON_TEST_TOKENIZERS")]
    tokenizers: PathBuf,
    /// A model with a chat template.
    #[arg(long, env = "BATON_TEST_MODEL")]
    model: PathBuf,
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<(), Error> {
    let args = Args::parse();
    let texts = texts()?;
    let mut folders: Vec<PathBuf> =
        fs::read_dir(&args.tokenizers)?.map(|entry| Ok(entry?.path())).collect::<Result<_, Error>>()?;
    folders.sort();
    let mut speeds = Builder::default();
    let head =
        ["tokeniser", "text", "tokenizers MB/s", "Baton, first sight", "Baton", "Baton, again", "ratio"];
    speeds.push_record(head);
    let mut detokenising = Vec::new();
    for folder in &folders {
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        let path = folder.join("tokenizer.json");
        let json = Json { content: fs::read(&path)?, path };
        let tables = Tables::from_bytes(&json.content)?;
        for (kind, text) in &texts {
            let row = speeds_of(&json, &tables, text, args.rounds)?;
            speeds.push_record([name.to_string(), (*kind).to_owned()].into_iter().chain(row));
        }
        let (tokenizer, token_texts) = json.tokenizer(0)?;
        let tokens = tokenizer.encode(&texts[2].1, false)?;
        detokenising.push(format!("{name} {:.0} ns", detokenise(token_texts, &tokens, args.rounds)));
    }
    println!("{}", speeds.build().with(Style::markdown()).modify(Columns::new(2..), Alignment::right()));
    println!("\ndetokenising, a token: {}", detokenising.join(", "));
    requests(&args, &texts[2].1)
}

/// Short chat, code, prose and Chinese, of this repository.
fn texts() -> Result<Vec<(&'static str, String)>, Error> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let short = "You are a helpful assistant. Please answer briefly: what is the capital of France, and how many \
                 people live there today? Thank you!";
    let mut code = String::new();
    for folder in ["src", "src/text", "src/http", "src/dispatch", "schedule/src", "tests/http"] {
        let mut files: Vec<PathBuf> =
            fs::read_dir(root.join(folder))?.map(|entry| Ok(entry?.path())).collect::<Result<_, Error>>()?;
        files.retain(|file| file.extension().is_some_and(|extension| extension == "rs"));
        files.sort();
        for file in files {
            code.push_str(&fs::read_to_string(file)?);
        }
    }
    let prose = ["../README.md", "../CHANGELOG.md", "benches/README.md", "schedule/benches/README.md"];
    let prose = prose.map(|file| fs::read_to_string(root.join(file)));
    let prose = prose.into_iter().collect::<Result<Vec<_>, _>>()?.concat();
    Ok(vec![
        ("chat, 131 B", short.to_owned()),
        ("code, 220 KB", sized(code.clone())),
        ("prose, 220 KB", sized(prose)),
        ("Chinese, 220 KB", sized(chinese())),
    ])
}

/// Repeated and cut to the length of long prompts.
fn sized(text: String) -> String {
    let mut whole = text.repeat(LONG_BYTES.div_ceil(text.len()));
    whole.truncate((0..=LONG_BYTES).rev().find(|&at| whole.is_char_boundary(at)).unwrap_or(0));
    whole
}

/// Clauses in ever other orders.
fn chinese() -> String {
    const CLAUSES: [&str; 16] = [
        "今天天气很好",
        "我们一起去公园散步",
        "机器学习模型需要大量的训练数据",
        "这个问题的答案并不简单",
        "请用三句话总结下面的文章",
        "经济发展带来了新的机遇和挑战",
        "他每天早上七点起床读书",
        "这座城市的历史可以追溯到唐代",
        "软件工程师正在调试分布式系统",
        "孩子们在操场上快乐地奔跑",
        "研究人员发表了一篇重要论文",
        "高速铁路缩短了两地之间的距离",
        "请把这段文字翻译成英文",
        "服务器的内存已经不够用了",
        "图书馆里安静得只能听见翻书的声音",
        "科学家发现了一颗新的行星",
    ];
    let mut text = String::new();
    let mut state = 1u64;
    while text.len() < LONG_BYTES {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let random = state >> 33;
        text.push_str(CLAUSES[random as usize % CLAUSES.len()]);
        text.push_str(["，", "，", "。", "。\n"][(random >> 8) as usize % 4]);
    }
    text
}

/// A `tokenizer.json`.
struct Json {
    content: Vec<u8>,
    path: PathBuf,
}

impl Json {
    fn tokenizer(&self, cache_bytes: usize) -> Result<(Tokenizer, TokenTexts), Error> {
        Ok(Tokenizer::of_json(&self.content, &self.path, None, &TextCache::new(cache_bytes))?)
    }
}

/// Seconds of one call.
fn seconds<R>(work: impl FnOnce() -> R) -> f64 {
    let begun = Instant::now();
    black_box(work());
    begun.elapsed().as_secs_f64()
}

/// Columns of one text: MB/s, and by how much Baton is faster.
fn speeds_of(json: &Json, tables: &Tables, text: &str, rounds: usize) -> Result<[String; 5], Error> {
    let (plain, _) = json.tokenizer(0)?;
    let (cached, _) = json.tokenizer(CACHE_BYTES)?;
    let theirs = tables.encode_fast(text, false)?;
    if plain.encode(text, false)? != theirs.get_ids() || cached.encode(text, false)? != theirs.get_ids() {
        return Err("the tokens differ".into());
    }
    let (fresh, _) = json.tokenizer(0)?;
    let first = seconds(|| fresh.encode(text, false));
    let mut best = [f64::MAX; 3];
    for round in 0..rounds {
        // `tokenizers` are slow: a few rounds of them say enough.
        if round < 3 {
            best[0] = best[0].min(seconds(|| tables.encode_fast(text, false)));
        }
        best[1] = best[1].min(seconds(|| plain.encode(text, false)));
        best[2] = best[2].min(seconds(|| cached.encode(text, false)));
    }
    let speed = |seconds: f64| format!("{:.1}", text.len() as f64 / seconds / 1e6);
    Ok([speed(best[0]), speed(first), speed(best[1]), speed(best[2]), format!("{:.0}", best[0] / best[1])])
}

/// Nanoseconds a token.
fn detokenise(texts: TokenTexts, tokens: &[u32], rounds: usize) -> f64 {
    let texts = Arc::new(texts);
    let round = |_| {
        seconds(|| {
            let (mut detokenizer, mut text) = (Detokenizer::new(texts.clone()), String::new());
            for &token in tokens {
                text.clear();
                detokenizer.push(token, &mut text);
                black_box(&text);
            }
        })
    };
    (0..rounds).map(round).fold(f64::MAX, f64::min) / tokens.len() as f64 * 1e9
}

/// Whole chat requests of 220 KB: from the body to tokens and the names of their blocks.
fn requests(args: &Args, content: &str) -> Result<(), Error> {
    let limits = RequestLimits { max_completion_tokens: 16, max_choices: 1 };
    let message = serde_json::json!({"role": "user", "content": content});
    let body = serde_json::json!({"model": "m", "messages": [message]}).to_string();
    for (name, cache_bytes) in [("everything tokenised", 0), ("sent before", CACHE_BYTES)] {
        let config = ModelConfig { path: args.model.clone(), ..ModelConfig::default() };
        let mut served = Served::open(&config, &ModelRoot::anywhere(), &TextCache::new(cache_bytes))?;
        served.context_tokens = u32::MAX;
        let request = || -> Result<_, Error> {
            let request = parse(body.as_bytes())?;
            Ok(prepare(&served, Endpoint::Chat, &request, limits, 1)?)
        };
        let tokens = request()?.prompts[0].tokens.clone();
        let best = (0..args.rounds).map(|_| seconds(request)).fold(f64::MAX, f64::min);
        let dialect = Dialect::new("layout", 16).ok_or("blocks of no tokens")?;
        // What was named before is as the tokens are: all of it, or nothing.
        let kept = KnownStrides::default();
        let names = || {
            let fresh = KnownStrides::default();
            let known = if cache_bytes > 0 { &kept } else { &fresh };
            Chains::new(tokens.clone()).say(&[dialect], &[], known)
        };
        let blocks = names()[0].keys.len();
        let hashed = (0..args.rounds).map(|_| seconds(names)).fold(f64::MAX, f64::min);
        println!(
            "chat of {} KB, {name}: {:.0} requests/s a core ({:.2} ms), the names of its {} blocks {:.2} ms more",
            body.len() / 1000,
            1.0 / best,
            best * 1e3,
            blocks,
            hashed * 1e3,
        );
    }
    Ok(())
}
