//! Weights of eight bits with a scale for each block, as DeepSeek V3 is published.

use std::fs;

use crate::small::{Stored, config, safetensors, stored, write_hugging_face};
use baton_checkpoint::{Checkpoint, Dtype, LayerWeight, Weight};
use tempfile::TempDir;

const DOWN: &str = "model.layers.0.mlp.down_proj.weight";
/// E4M3 of 1.5.
const ONE_AND_A_HALF: u8 = 0x3c;

/// The model's tensors with one of eight bits, `[8, 12]` in blocks of 5 by 8, and its scales.
fn eight_bits() -> Vec<Stored> {
    let mut tensors = stored();
    let down = tensors.iter_mut().find(|tensor| tensor.0 == DOWN).expect("the tensor");
    (down.1, down.3) = ("F8_E4M3", vec![ONE_AND_A_HALF; 8 * 12]);
    let scales = [2f32, -1.0, 0.5, 4.0].map(f32::to_le_bytes).concat();
    tensors.push((format!("{DOWN}_scale_inv"), "F32", vec![2, 2], scales));
    tensors
}

fn quantisation() -> serde_json::Value {
    serde_json::json!({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [5, 8]})
}

fn open(tensors: &[Stored], quantisation: Option<serde_json::Value>) -> Result<Checkpoint, String> {
    let place = TempDir::new().expect("a temporary directory");
    write_hugging_face(place.path());
    fs::write(place.path().join("model.safetensors"), safetensors(tensors)).expect("written");
    let mut config = config();
    quantisation.into_iter().for_each(|quantisation| config["quantization_config"] = quantisation);
    fs::write(place.path().join("config.json"), config.to_string()).expect("written");
    Checkpoint::open(place.path()).map_err(|error| error.to_string())
}

#[test]
fn every_block_has_its_scale() {
    let bf16 = [0x4000_u16, 0xbf80, 0x3f00, 0x4080].iter().flat_map(|half| half.to_le_bytes()).collect();
    let mut halves = eight_bits();
    let scales = halves.last_mut().expect("the scales");
    (scales.1, scales.3) = ("BF16", bf16);
    for tensors in [eight_bits(), halves] {
        let checkpoint = open(&tensors, Some(quantisation())).expect("it opens");
        let down = checkpoint.tensor(Weight::Layer(0, LayerWeight::Down)).expect("the tensor");
        assert_eq!(down.dtype, Dtype::F8E4M3);
        let values = down.to_f32();
        for (i, value) in values.into_iter().enumerate() {
            let (row, column) = (i / 12, i % 12);
            let scale = [[2.0, -1.0], [0.5, 4.0]][row / 5][column / 8];
            assert!(value == 1.5 * scale, "{row} {column}: {value}");
        }
    }
}

#[test]
fn a_scale_is_part_of_the_revision() {
    let place = TempDir::new().expect("a temporary directory");
    let of = |tensors: &[Stored]| {
        write_hugging_face(place.path());
        fs::write(place.path().join("model.safetensors"), safetensors(tensors)).expect("written");
        let mut config = config();
        config["quantization_config"] = quantisation();
        fs::write(place.path().join("config.json"), config.to_string()).expect("written");
        Checkpoint::open(place.path()).expect("it opens").revision().expect("it is read")
    };
    let mut other = eight_bits();
    other.last_mut().expect("the scales").3[0] ^= 1;
    assert_ne!(of(&eight_bits()), of(&other));
}

#[test]
fn errors_name_what_is_wrong() {
    let changed = |change: &dyn Fn(&mut Vec<Stored>)| {
        let mut tensors = eight_bits();
        change(&mut tensors);
        tensors
    };
    let with = |field: &str, value: serde_json::Value| {
        let mut quantisation = quantisation();
        quantisation[field] = value;
        Some(quantisation)
    };
    let whole = eight_bits();
    let cases: [(&[Stored], Option<serde_json::Value>, &[&str]); 9] = [
        (&whole, None, &[DOWN, "quantization_config"]),
        (&whole, with("quant_method", "awq".into()), &["quantization_config.quant_method", "awq", "GGUF"]),
        (&whole, with("fmt", "e5m2".into()), &["quantization_config.fmt", "e5m2", "e4m3"]),
        (&whole, with("weight_block_size", serde_json::Value::Null), &["weight_block_size", "[128, 128]"]),
        (&whole, with("weight_block_size", serde_json::json!([0, 8])), &["weight_block_size", "[0,8]"]),
        (&whole, with("weight_block_size", serde_json::json!([4, 4])), &[DOWN, "[2, 2]", "[2, 3]"]),
        (&changed(&|tensors| drop(tensors.pop())), Some(quantisation()), &[DOWN, "_scale_inv"]),
        (
            &changed(&|tensors| tensors.last_mut().unwrap().1 = "I32"),
            Some(quantisation()),
            &["_scale_inv", "I32"],
        ),
        (
            &changed(&|tensors| {
                tensors.last_mut().unwrap().0 = "model.layers.0.mlp.up_proj.weight_scale_inv".into();
            }),
            Some(quantisation()),
            &["_scale_inv"],
        ),
    ];
    for (tensors, quantisation, words) in cases {
        let message = open(tensors, quantisation).expect_err("it is refused");
        for word in words {
            assert!(message.contains(word), "{word:?} is not in: {message}");
        }
    }
}
