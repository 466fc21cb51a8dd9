//! The real model's tokenizer and chat template, end to end; its weights are not needed.

use std::path::PathBuf;

use baton_checkpoint::ModelRoot;
use baton_coordinator::{config::ModelConfig, prepare::Served, text::TextCache};
use baton_proto::v1;
use serde_json::{Value, json};
use v1::{FinishReason, attach_response::Frame as Answer, leg_output::End};

use crate::scripted::{Cluster, chat_text, events, prompt_of};

fn model() -> Served {
    let path = std::env::var_os("BATON_TEST_MODEL").map(PathBuf::from).expect(
        "BATON_TEST_MODEL is not set: it names the SmolLM2-135M-Instruct GGUF file (./deploy/run test fetches it)",
    );
    Served::open(
        &ModelConfig { path, ..ModelConfig::default() },
        &ModelRoot::anywhere(),
        &TextCache::new(1 << 20),
    )
    .expect("the model opens")
}

#[tokio::test]
async fn words_characters_and_stop_strings_cross_token_borders() {
    let served = model();
    assert_eq!((&*served.name, served.context_tokens), ("SmolLM2-135M-Instruct", 8192));
    let text = served.text.clone();
    let stop_token = served.stop_tokens[0];
    let roles = [("p", v1::Role::Prefill), ("d", v1::Role::Decode)];
    let (cluster, [mut prefill, mut decode]) = Cluster::start_with(served, roles, |_| {}).await;

    let said = "Naïve café: 日本語 🏃‍♀️🏃 — done.\n\nUser: and then";
    let tokens = text.tokenise_text(said).expect("is tokenised");
    for (stop, expected) in
        [(json!(null), said), (json!(["\n\nUser:"]), &said[..said.find("\n\nUser:").unwrap_or(0)])]
    {
        for stream in [true, false] {
            let body = json!({"model": "SmolLM2-135M-Instruct", "stream": stream, "stop": stop,
                "messages": [{"role": "user", "content": "Hello"}]});
            let response = cluster.post("/v1/chat/completions", body.to_string());
            let (p, d) = (prefill.dispatch().await, decode.dispatch().await);
            // <|im_start|>system ... <|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n
            let prompt = prompt_of(&p);
            assert_eq!((prompt[0], prompt.iter().filter(|&&token| token == 1).count()), (1, 3));
            let step = |leg, first_position, tokens: &[u32], end| {
                let output =
                    v1::LegOutput { leg, first_position, tokens: tokens.to_vec(), end, ..Default::default() };
                Answer::Step(v1::StepOutput { legs: vec![output] })
            };
            let end = |reason: FinishReason| {
                Some(End::Finished(v1::Finished { reason: reason.into(), ..Default::default() }))
            };
            prefill.say(step(p.leg, 0, &tokens[..1], end(FinishReason::HandedOff)));
            for (at, token) in tokens.iter().enumerate().skip(1) {
                decode.say(step(d.leg, at as u32, &[*token], None));
            }
            if stop.is_null() {
                decode.say(step(d.leg, tokens.len() as u32, &[stop_token], end(FinishReason::Stop)));
            } else {
                assert_eq!(decode.cancelled().await.leg, d.leg);
            }
            let body = response.await.expect("ends").text().await.expect("a body");
            if stream {
                assert_eq!(chat_text(&events(&body)), expected);
            } else {
                let answer: Value = serde_json::from_str(&body).expect("is JSON");
                assert_eq!(answer["choices"][0]["message"]["content"], expected);
                assert_eq!(answer["choices"][0]["finish_reason"], "stop");
            }
        }
    }
    cluster.at_rest().await;
}
