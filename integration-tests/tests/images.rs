//! Container images as files: the same ones whenever and wherever they are made of the same programs, and with nothing in them
//! that a program does not need.

use std::{collections::BTreeMap, path::Path, process::Command};

use baton_integration_tests::{binary, folder};
use serde_json::Value;

/// Those of ours; etcd's is made as they are.
const IMAGES: [(&str, &[&str]); 4] = [
    ("baton", &["baton", "baton-controller", "baton-coordinator", "baton-server"]),
    ("baton-controller", &["baton-controller"]),
    ("baton-coordinator", &["baton-coordinator"]),
    ("baton-server", &["baton-server"]),
];
/// Of an image without its programs: the C library and what else they are linked with.
const SYSTEM_BYTES_MOST: usize = 8 << 20;

/// The images as files in a folder, by the programs of this build, as this process's caller or another would make them.
fn build(out: &Path, elsewhere: bool) {
    let programs = binary("baton");
    let programs = programs.parent().expect("a folder").canonicalize().expect("it is there");
    let mut build =
        Command::new(folder().join("../deploy/images/build").canonicalize().expect("it is there"));
    build.args(["standalone", "controller", "coordinator", "server"]);
    build.args(["--tag", "test", "--out"]).arg(out).arg("--programs").arg(programs);
    if elsewhere {
        build.current_dir(out.parent().expect("a folder"));
        build.envs([("TZ", "Asia/Shanghai"), ("PYTHONHASHSEED", "7"), ("LC_ALL", "C")]);
    }
    let output = build.output().expect("it runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// What a tar archive holds: of each file its mode, its owner and its bytes.
fn unpacked(archive: &[u8]) -> BTreeMap<String, (u32, u64, Vec<u8>)> {
    let text = |bytes: &[u8]| {
        let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
        String::from_utf8_lossy(&bytes[..end]).trim().to_owned()
    };
    let octal = |bytes: &[u8]| u64::from_str_radix(&text(bytes), 8).expect("a number");
    let (mut files, mut rest, mut long) = (BTreeMap::new(), archive, None);
    while let Some((head, after)) = rest.split_at_checked(512).filter(|(head, _)| head[0] != 0) {
        let length = octal(&head[124..136]) as usize;
        let content = &after[..length];
        match head[156] {
            // The name of the next one.
            b'L' => long = Some(text(content)),
            b'0' => {
                let name = long.take().unwrap_or_else(|| text(&head[..100]));
                files.insert(name, (octal(&head[100..108]) as u32, octal(&head[108..116]), content.to_vec()));
            }
            _ => long = None,
        }
        rest = &after[length.next_multiple_of(512)..];
    }
    files
}

#[test]
fn the_same_programs_make_the_same_images_and_nothing_else_is_in_them() {
    let dir = tempfile::tempdir().expect("a folder");
    let (here, there) = (dir.path().join("here"), dir.path().join("some/where/else"));
    std::fs::create_dir_all(there.parent().expect("a folder")).expect("a folder");
    build(&here, false);
    build(&there, true);
    for (image, programs) in IMAGES {
        let [one, other] = [&here, &there].map(|of| {
            std::fs::read(of.join(format!("{image}.tar"))).unwrap_or_else(|error| panic!("{image}: {error}"))
        });
        assert!(one == other, "{image}: not the same bytes");
        let outer = unpacked(&one);
        let manifest: Value = serde_json::from_slice(&outer["manifest.json"].2).expect("JSON");
        let layers = manifest[0]["Layers"].as_array().expect("layers").iter();
        let layers: Vec<_> =
            layers.map(|layer| unpacked(&outer[layer.as_str().expect("a path")].2)).collect();
        let [system, ours] = &layers[..] else { panic!("{image}: {} layers", layers.len()) };
        let names: Vec<&str> = ours.keys().map(String::as_str).collect();
        assert_eq!(names, programs.iter().map(|name| format!("usr/bin/{name}")).collect::<Vec<_>>());
        let bytes: usize = system.values().map(|(.., content)| content.len()).sum();
        assert!(bytes < SYSTEM_BYTES_MOST, "{image}: {bytes} bytes beside the programs");
        for (name, (mode, owner, _)) in layers.iter().flatten() {
            assert_eq!(mode & 0o7022, 0, "{image}: {name}: {mode:o}");
            assert_eq!(*owner, 0, "{image}: {name}: what runs there owns nothing");
        }
        let known = ["etc/", "usr/share/doc/baton/"];
        for name in system.keys().filter(|name| !known.iter().any(|known| name.starts_with(known))) {
            assert!(name.contains(".so"), "{image}: {name} is no library");
        }
        let config: Value =
            serde_json::from_slice(&outer[manifest[0]["Config"].as_str().expect("a path")].2).expect("JSON");
        assert_eq!(config["config"]["User"], "65532:65532");
        assert_eq!(config["config"]["Entrypoint"][0], format!("/usr/bin/{}", programs[0]));
    }
}
