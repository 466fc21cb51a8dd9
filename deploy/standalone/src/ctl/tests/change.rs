//! Changes: what is asked for, and the wait of a drain.

use baton_proto::v1::{InstanceLoad, Phase, Role, RoleView};

use super::{
    super::{
        fake::{Fake, Says},
        instances::tests::instance,
        roles::tests::view,
    },
    parse, run, says,
};

#[test]
fn every_change_is_understood() {
    for line in [
        "cordon server-0 --reason disk --force --dry-run -o json",
        "drain server-0 --within 30s --timeout 1m --reason disk --force",
        "uncordon server-0 --dry-run",
        "set-role server-0 prefill",
        "set-role server-0 auto --dry-run",
        "set-targets default --policy ratio --ratio 1:3",
        "set-targets default --ttft 500ms --tpot 50ms",
        "set-targets default --reset",
        "rebalance --dry-run",
        "rebalance default",
        "key add a-1 --tenant a --requests-per-minute 5 --tokens-per-minute 9 --concurrent 2 --weight 3",
        "key add a-1 --band interactive --expires-in 2160h",
        "key generate a-1",
        "key list -o json --no-headers",
        "key revoke a-1",
    ] {
        assert!(parse(line).is_ok(), "{line}: {}", parse(line).unwrap_err());
    }
}

#[test]
fn changes_that_make_no_sense_are_refused() {
    for (line, says) in [
        ("cordon", "NAME"),
        ("set-role server-0 none", "possible values"),
        ("set-targets default", "required"),
        ("set-targets default --ratio 1", "as in 1:3"),
        ("set-targets default --ttft 5", "as in 250ms"),
        ("set-targets default --reset --ratio 1:1", "cannot be used with"),
        ("drain server-0 --within soon", "not a duration"),
        ("key add", "NAME"),
        ("key add A", "an API key's name must be"),
        ("key add a --tenant A", "a tenant's name must be"),
        ("key add a --requests-per-minute 0", "zero"),
        ("key add a --band first", "possible values"),
        ("key revoke", "NAME"),
    ] {
        let error = parse(line).unwrap_err().to_string();
        assert!(error.contains(says), "{line}: {error}");
    }
}

#[tokio::test]
async fn every_change_asks_for_what_it_is() {
    for (line, asked) in [
        ("cordon server-2 --reason disk", vec!["cordon server-2 \"disk\" 0 false false"]),
        ("cordon server-2 --force --dry-run", vec!["cordon server-2 \"\" 0 true true"]),
        ("drain server-2 --within 30s --dry-run", vec!["cordon server-2 \"\" 30000 false true"]),
        ("uncordon server-2", vec!["uncordon server-2 false"]),
        ("key add a-1 --tenant a --requests-per-minute 5 --band batch", vec!["add-key a-1 a 32 Batch 5"]),
        ("key list", vec!["keys"]),
        ("key revoke a-1", vec!["revoke-key a-1"]),
        ("set-role server-2 mixed", vec!["set-role server-2 Mixed false"]),
        ("set-role server-2 auto --dry-run", vec!["set-role server-2 Unspecified true"]),
        ("set-targets default --ratio 1:3", vec!["set-targets default Some(\"ratio 1:3\") false"]),
        (
            "set-targets default --tpot 50ms --dry-run",
            vec!["set-targets default Some(\"auto, TPOT 50ms\") true"],
        ),
        ("set-targets default --reset", vec!["set-targets default None false"]),
        ("rebalance --dry-run", vec!["plan of \"\"", "rebalance default true"]),
    ] {
        let fake = Fake::controller(says()).await;
        run(line, &fake).await.unwrap();
        assert_eq!(fake.asked(), asked, "{line}");
    }
}

#[tokio::test]
async fn a_drain_waits_until_nothing_runs() {
    let draining = RoleView {
        desired_role: Role::None.into(),
        observed_role: Role::Decode.into(),
        phase: Phase::Draining.into(),
        ..view()
    };
    let drained =
        RoleView { observed_role: Role::None.into(), phase: Phase::Ready.into(), ..draining.clone() };
    let mut idle = instance("server-0", Phase::Ready);
    idle.beat.as_mut().unwrap().load = Some(InstanceLoad::default());
    let says = Says { instances: vec![idle], roles: vec![vec![draining.clone()], vec![drained]], ..says() };
    let fake = Fake::controller(says.clone()).await;
    run("drain server-0 --within 2s", &fake).await.unwrap();
    assert_eq!(fake.asked()[0], "cordon server-0 \"\" 2000 false false");
    assert_eq!(fake.asked().iter().filter(|asked| *asked == "roles").count(), 2);

    let stays = Fake::controller(Says { roles: vec![vec![draining]], ..says }).await;
    let text = run("drain server-0 --timeout 10ms", &stays).await.unwrap_err().to_string();
    assert!(
        text.starts_with("server-0: decode, draining, 0 running after 10ms: it stays cordoned"),
        "{text}"
    );
    assert!(text.ends_with("`baton ctl uncordon server-0`"), "{text}");
}
