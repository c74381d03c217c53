//! Mounts file systems in a private mount namespace.

use std::ffi::OsStr;
use std::process::{Command, Output};

use crate::needs::{needs, passed_over};

/// Runs a shell script with these arguments where it may mount. Returns `None` where mounting is
/// not allowed.
pub(crate) fn mounting(script: &str, arguments: &[impl AsRef<OsStr>]) -> Option<Output> {
    if !needs(&["mount", "unshare"]) {
        return None;
    }
    let root = rustix::process::geteuid().is_root();
    let unshared = |script: &str| {
        let mut command = Command::new("unshare");
        command.args(if root { &["-m"][..] } else { &["-r", "-m"] });
        command.args(["sh", "-ec", script]);
        command
    };
    let may = unshared("mount -t tmpfs tmpfs /mnt").output().is_ok_and(|tried| tried.status.success());
    if !may {
        passed_over("mounting is not allowed here, to root or in a user namespace");
        return None;
    }
    Some(unshared(script).args(arguments).output().unwrap())
}
