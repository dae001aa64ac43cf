//! What is asked of a Debian system: whether it is one, which packages it has, and installing more.

use std::{collections::HashSet, fs};

use anyhow::{Context as _, Result, ensure};
use xshell::{Shell, cmd};

use crate::machine::is_root;

/// The keys of Debian's archive.
pub(crate) const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// A Debian package, and why it is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Package {
    pub(crate) name: &'static str,
    pub(crate) why: &'static str,
}

/// Whether packages come by apt from Debian itself; its derivatives lack some that are needed.
pub(crate) fn is_debian() -> bool {
    fs::read_to_string("/etc/os-release").is_ok_and(|text| field(&text, "ID") == Some("debian"))
}

/// Those of `wanted` that are not installed.
pub(crate) fn missing(shell: &Shell, wanted: &[Package]) -> Result<Vec<Package>> {
    let names = wanted.iter().map(|package| package.name);
    let format = "--showformat=${db:Status-Status}:${Package}\n";
    // dpkg-query fails when it knows nothing of one of them, and still prints the others.
    let known = cmd!(shell, "dpkg-query --show {format} {names...}")
        .quiet()
        .ignore_status()
        .ignore_stderr()
        .read()
        .context("this system has no dpkg-query")?;
    let installed: HashSet<&str> = known.lines().filter_map(|line| line.strip_prefix("installed:")).collect();
    Ok(wanted.iter().filter(|package| !installed.contains(package.name)).copied().collect())
}

/// Installs packages, saying each one's purpose.
pub(crate) fn install(shell: &Shell, packages: &[Package]) -> Result<()> {
    let names = &packages.iter().map(|package| package.name).collect::<Vec<_>>();
    ensure!(is_root(), "installing {} needs root: run this once as root", names.join(" "));
    for package in packages {
        println!("setup: apt package {:<24} {}", package.name, package.why);
    }
    // Others may be installing too: wait for them rather than fail.
    let options = ["-q", "-y", "-oDPkg::Lock::Timeout=600", "-oAcquire::Retries=3"];
    cmd!(shell, "apt-get {options...} update").run()?;
    cmd!(shell, "apt-get {options...} install --no-install-recommends {names...}")
        .env("DEBIAN_FRONTEND", "noninteractive")
        .run()
        .with_context(|| format!("this Debian could not install {}", names.join(" ")))
}

/// The value of a field of an os-release file, without its quotes.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines()
        .find_map(|line| line.trim().strip_prefix(name)?.strip_prefix('='))
        .map(|value| value.trim_matches(['"', '\'']))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_not_found_in_a_longer_name() {
        let text = "PRETTY_NAME=\"Debian GNU/Linux 12\"\nVERSION_ID=\"12\"\nID=debian\n";
        assert_eq!(field(text, "ID"), Some("debian"));
        assert_eq!(field(text, "VERSION_ID"), Some("12"));
        assert_eq!(field(text, "NAME"), None);
    }

    #[test]
    fn a_quoted_field_loses_its_quotes() {
        assert_eq!(field("ID='ubuntu'", "ID"), Some("ubuntu"));
    }
}
