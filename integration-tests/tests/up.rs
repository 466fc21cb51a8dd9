//! `baton up` from outside: how it ends, and what it says when it cannot begin.

use std::{
    fs,
    net::TcpListener,
    process::{Command, Stdio},
    time::Duration,
};

use baton_integration_tests::{
    Cluster,
    chat::{Events, request},
    model, process,
};
use rustix::process::Signal;

/// `baton up` with arguments that must fail; its error.
fn refused(arguments: &[&str]) -> String {
    process::refused("baton", &[&["up"], arguments].concat())
}

fn says(error: &str, words: &[&str]) {
    words.iter().for_each(|word| assert!(error.contains(word), "no {word:?} in: {error}"));
}

#[test]
fn what_cannot_start_says_why_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let run_dir = dir.path().join("run");
    let run_dir = ["--run-dir", run_dir.to_str().unwrap()];
    let up = |more: &[&str]| refused(&[&run_dir, more].concat());
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();

    says(&up(&["--model", "/no/such/model.gguf"]), &["/no/such/model.gguf"]);

    let damaged = path("damaged.gguf");
    fs::write(&damaged, &fs::read(model()).unwrap()[..1 << 20]).unwrap();
    says(&up(&["--model", &damaged]), &["damaged.gguf"]);
    let nonsense = path("nonsense.gguf");
    fs::write(&nonsense, b"this is no model").unwrap();
    says(&up(&["--model", &nonsense]), &["nonsense.gguf"]);
    fs::create_dir(path("empty")).unwrap();
    says(&up(&["--model", &path("empty")]), &["config.json"]);

    let (link, root) = (path("link.gguf"), format!("server.model.root={}", dir.path().display()));
    std::os::unix::fs::symlink(model(), &link).unwrap();
    says(&up(&["--model", &link, "--set", &root]), &["is not under", "model.root"]);
    says(
        &up(&["--model", &link, "--set", "server.model.root=/no/such/root"]),
        &["server: model.root", "/no/such/root"],
    );

    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let model = model();
    let listen = format!("127.0.0.1:{port}");
    says(&up(&["--model", model.to_str().unwrap(), "--listen", &listen]), &[&port, "in use"]);

    let twice = ["--model", model.to_str().unwrap(), "--model", model.to_str().unwrap()];
    says(&up(&[&twice[..], &["--listen", "127.0.0.1:0"]].concat()), &["give each --model once"]);

    let misspelt = ["--listen", "127.0.0.1:0", "--set", "server.runtme.threads=1"];
    let misspelt = up(&[&["--model", model.to_str().unwrap()], &misspelt[..]].concat());
    says(&misspelt, &["error: server: ", "runtme"]);
    assert!(!dir.path().join("run/server-0.log").exists(), "nothing was started");

    fs::write(path("file"), b"").unwrap();
    says(&up(&["--cache-dir", &path("file/cache")]), &["file/cache"]);
    says(&refused(&["--model", model.to_str().unwrap(), "--run-dir", &path("file/run")]), &["file/run"]);
}

#[tokio::test]
async fn the_printed_lines_work_when_pasted() {
    let cluster = Cluster::start(&[]).await;
    let pasted = async |name: &str| {
        let screen = baton_integration_tests::eventually("the greeting", || async {
            let screen = cluster.screen();
            screen.contains("Ctrl-C").then_some(screen)
        })
        .await;
        let line =
            screen.lines().find_map(|line| line.trim().strip_prefix(name)).expect("the line is printed");
        let line = line.split("     (").next().expect("a command").trim().to_owned();
        let shell =
            Command::new("sh").args(["-c", &line]).stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
        let output = process::finish(shell.expect("a shell starts"), Duration::from_secs(60));
        assert!(output.status.success(), "{line}");
        String::from_utf8(output.stdout).expect("UTF-8")
    };
    let events = pasted("ask ").await;
    assert!(events.contains("Paris") && events.trim_end().ends_with("data: [DONE]"), "{events}");
    let instances = pasted("look ").await;
    assert!(instances.contains("server-0") && instances.contains("server-1"), "{instances}");
}

#[tokio::test]
async fn ctrl_c_finishes_what_runs_and_leaves_no_process() {
    let cluster = Cluster::start(&[]).await;
    let mut events =
        Events::open(cluster.url(), &request(cluster.model(), "Tell me a story.", 60, true)).await;
    events.next().await.expect("the stream goes on");
    let pids = cluster.pids();
    assert_eq!(pids.len(), 4, "{pids:?}");
    let stopping = tokio::spawn(cluster.stop());
    let (text, error) = events.rest().await;
    assert_eq!(error, None);
    assert!(!text.is_empty());
    stopping.await.expect("up ends in order");
    pids.iter().for_each(|(name, pid)| assert!(!process::alive(*pid), "{name} is still there"));
}

#[tokio::test]
async fn no_process_outlives_a_killed_supervisor() {
    let cluster = Cluster::start(&[]).await;
    let pids = cluster.pids();
    cluster.signal_up(Signal::KILL);
    baton_integration_tests::eventually("every service ended", || async {
        pids.values().all(|pid| !process::alive(*pid)).then_some(())
    })
    .await;
}

#[tokio::test]
async fn more_instances_share_the_work() {
    let cluster = Cluster::start(&["--prefill", "2", "--decode", "1"]).await;
    assert_eq!(cluster.roles().await, ["decode", "prefill", "prefill"]);
    let bodies: Vec<_> = (0..8)
        .map(|i| request(cluster.model(), &format!("Tell me about the number {i}."), 16, false))
        .collect();
    let answers = baton_integration_tests::chat::ask_all(cluster.url(), &bodies).await;
    assert!(answers.iter().all(|answer| !answer.is_empty()));
    cluster.assert_nothing_held().await;
}

/// Kilobytes of a process's mappings of packed copies: all of it, and this process's share.
fn packed(pid: u32) -> (u64, u64) {
    let (mut resident, mut share, mut counts) = (0, 0, false);
    for line in fs::read_to_string(format!("/proc/{pid}/smaps")).expect("it runs").lines() {
        let mut words = line.split_whitespace();
        let (first, number) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
        match first {
            "Rss:" if counts => resident += number.parse::<u64>().expect("a number"),
            "Pss:" if counts => share += number.parse::<u64>().expect("a number"),
            _ if first.ends_with(':') => {}
            _ => counts = line.ends_with(".packed") || line.ends_with(".packed.part"),
        }
    }
    (resident, share)
}

#[tokio::test]
async fn servers_share_the_memory_of_their_weights() {
    let cache = tempfile::tempdir().expect("a temporary directory");
    let arguments = ["--cache-dir", cache.path().to_str().expect("UTF-8")];
    // At first one of the servers writes the copy; both are asked for all weights by an answer.
    for time in ["first", "second"] {
        let cluster = Cluster::start(&arguments).await;
        let body = request(cluster.model(), "Tell me about the moon.", 8, false);
        let answers = baton_integration_tests::chat::ask_all(cluster.url(), &[body]).await;
        assert!(!answers[0].is_empty());
        let weights = fs::metadata(model()).expect("the model is there").len() / 1024;
        for name in ["server-0", "server-1"] {
            let (resident, share) = packed(cluster.pids()[name]);
            assert!(resident > weights * 9 / 10, "{name}, {time}: {resident} kB of {weights} kB");
            assert!(share < weights * 6 / 10, "{name}, {time}: {share} kB of {weights} kB for itself");
        }
        cluster.stop().await;
    }
    let copies = fs::read_dir(cache.path().join("packed")).expect("the folder of copies");
    let names: Vec<String> =
        copies.map(|entry| entry.expect("readable").file_name().to_string_lossy().into_owned()).collect();
    assert_eq!(names.iter().filter(|name| name.ends_with(".packed")).count(), 1, "{names:?}");
    assert!(!names.iter().any(|name| name.ends_with(".part")), "{names:?}");
}
