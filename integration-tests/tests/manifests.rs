//! The manifests for Kubernetes, offline. The promises are in python/manifests.

use std::{
    process::{Command, Stdio},
    time::Duration,
};

use baton_integration_tests::{binary, folder, process, required};

#[test]
fn manifests_are_valid_fit_the_programs_and_are_the_same_by_kustomize_and_helm() {
    for variable in
        ["BATON_TEST_KUBECTL", "BATON_TEST_HELM", "BATON_TEST_PROMTOOL", "BATON_TEST_KUBERNETES_SCHEMAS"]
    {
        required(variable);
    }
    let programs = binary("baton");
    let check = Command::new(required("BATON_TEST_PYTHON"))
        .arg(folder().join("python/manifests"))
        .arg(programs.parent().expect("programs lie in a folder"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the Python program starts");
    let output = process::finish(check, Duration::from_secs(300));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
