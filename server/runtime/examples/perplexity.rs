//! Tells how likely models find a fixed text: `perplexity MODEL...`, of files with SmolLM2's tokenizer. Prints the
//! perplexity with each type of KV cache; `tests/reference/perplexity.py print MODEL...` tells llama.cpp's.

#[path = "../tests/likelihood/mod.rs"]
mod likelihood;

use std::{env, error::Error, path::PathBuf, process::ExitCode};

use baton_runtime::KvDtype;
use likelihood::{Reference, perplexity};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let models: Vec<PathBuf> = env::args_os().skip(1).map(PathBuf::from).collect();
    if models.is_empty() {
        return Err("usage: perplexity MODEL...".into());
    }
    let Reference { model, perplexity: whole, exact, windows } = Reference::read()?;
    println!("llama.cpp with {model}: {whole:.4}, with its weights as F32: {exact:.4}");
    let heads = KvDtype::ALL.map(|dtype| format!("{:>10}", format!("KV {}", dtype.name())));
    println!("{:<40} {}", "", heads.join(" "));
    for model in models {
        let name = model.file_stem().unwrap_or(model.as_os_str()).to_string_lossy();
        print!("{name:<40}");
        for kv_dtype in KvDtype::ALL {
            print!(" {:>10.4}", perplexity(&model, kv_dtype, 0, &windows)?);
        }
        println!();
    }
    Ok(())
}
