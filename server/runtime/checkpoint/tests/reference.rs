//! Blocks and rope frequencies against the numbers in `reference/`, which other programs computed.

use baton_checkpoint::{Dtype, Rope, RopeOrder, RopeScaling};
use serde_json::Value;

const TYPES: [Dtype; 11] = [
    Dtype::F32,
    Dtype::F16,
    Dtype::Bf16,
    Dtype::Q8_0,
    Dtype::Q4_0,
    Dtype::Q4_1,
    Dtype::Q5_0,
    Dtype::Q5_1,
    Dtype::Q4K,
    Dtype::Q5K,
    Dtype::Q6K,
];

fn numbers(value: &Value) -> Vec<f32> {
    value.as_array().expect("an array").iter().map(|x| x.as_f64().expect("a number") as f32).collect()
}

#[test]
fn blocks_are_read_as_ggml_reads_them() {
    let file: Value = serde_json::from_str(include_str!("reference/dequantize.json")).expect("JSON");
    let cases = file.as_object().expect("an object");
    for (name, case) in cases {
        let dtype = TYPES.into_iter().find(|dtype| dtype.name() == name).expect(name);
        let hex = case["bytes"].as_str().expect("hex");
        let bytes: Vec<u8> = (0..hex.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).expect("hex"))
            .collect();
        let wanted = numbers(&case["values"]);
        let mut values = vec![0.0; wanted.len()];
        dtype.dequantize(&bytes, &mut values);
        for (i, (value, wanted)) in values.iter().zip(&wanted).enumerate() {
            assert!(
                (value - wanted).abs() <= 1e-5 * wanted.abs().max(1e-2),
                "{name} {i}: {value}, not {wanted}"
            );
        }
    }
    assert_eq!(cases.len() + 2, TYPES.len(), "F32 and BF16 need no reference");
}

#[test]
fn plain_types_are_read_exactly() {
    let mut out = [0.0; 2];
    Dtype::F32.dequantize(&[0, 0, 0x80, 0x3f, 0, 0, 0, 0xc0], &mut out);
    assert_eq!(out, [1.0, -2.0]);
    Dtype::Bf16.dequantize(&[0x80, 0x3f, 0, 0xc0], &mut out);
    assert_eq!(out, [1.0, -2.0]);
    let mut out = [0.0; 8];
    // The largest, the smallest normal and the smallest; zero of either sign; no number.
    Dtype::F8E4M3.dequantize(&[0x38, 0xc0, 0x7e, 0x88, 0x01, 0x00, 0x80, 0xff], &mut out);
    assert_eq!(out[..7], [1.0, -2.0, 448.0, -1.0 / 64.0, 1.0 / 512.0, 0.0, -0.0]);
    assert!(out[6].is_sign_negative() && out[7].is_nan());
}

#[test]
fn rope_frequencies_are_those_of_transformers() {
    let file: Value = serde_json::from_str(include_str!("reference/rope.json")).expect("JSON");
    for case in file.as_array().expect("an array") {
        let name = case["name"].as_str().expect("a name");
        let parameters = &case["parameters"];
        let number = |key: &str| parameters[key].as_f64().map(|x| x as f32);
        let original = || parameters["original_max_position_embeddings"].as_u64().expect("a length") as u32;
        let factor = || number("factor").expect("a factor");
        let scale = case["scale"].as_f64().expect("a scale") as f32;
        let scaling = match parameters["rope_type"].as_str().expect("a kind") {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: factor() },
            "llama3" => RopeScaling::Llama3 {
                factor: factor(),
                low_freq_factor: number("low_freq_factor").expect("low"),
                high_freq_factor: number("high_freq_factor").expect("high"),
                original_context_tokens: original(),
            },
            _ => RopeScaling::Yarn {
                factor: factor(),
                original_context_tokens: original(),
                beta_fast: number("beta_fast").unwrap_or(32.0),
                beta_slow: number("beta_slow").unwrap_or(1.0),
                attention_factor: scale,
                truncate: parameters["truncate"].as_bool().unwrap_or(true),
            },
        };
        let rope = Rope { theta: number("rope_theta").expect("theta"), scaling, order: RopeOrder::Halves };
        let frequencies = rope.frequencies(64);
        assert_eq!(frequencies.scale, scale, "{name}");
        let wanted = numbers(&case["inverse"]);
        assert_eq!(frequencies.inverse.len(), wanted.len());
        for (i, (value, wanted)) in frequencies.inverse.iter().zip(&wanted).enumerate() {
            assert!((value - wanted).abs() <= 2e-6 * wanted, "{name} {i}: {value}, not {wanted}");
        }
    }
}
