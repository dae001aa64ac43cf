//! The kernels virtual machines run: Debian's cloud kernels by suite, or any image by its path.
//!
//! Debian's come by an apt configuration of their own, are unpacked and never installed, and are kept in `target/vm`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use xshell::cmd;

use crate::{debian, workspace::Workspace};

/// Names of the supported kernels and the suites Debian has them in. Which patch level that is moves with the suite.
const SUITES: [(&str, &str); 3] = [("6.1", "bookworm"), ("6.12", "bookworm-backports"), ("7.2", "sid")];

/// The package whose dependencies are the kernel of a suite.
const PACKAGE: &str = "linux-image-cloud-amd64";

/// A kernel that can be booted.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    pub(crate) name: String,
    /// The bzImage.
    pub(crate) image: PathBuf,
    /// Where its modules are, if it needs any.
    pub(crate) modules: Option<PathBuf>,
}

/// The names of all supported kernels, oldest first.
pub(crate) fn supported() -> impl Iterator<Item = String> {
    SUITES.iter().map(|(name, _)| (*name).to_owned())
}

impl Kernel {
    /// A supported kernel by its name, fetched if it is not there yet, or an image by its path with `modules`.
    pub(crate) fn find(workspace: &Workspace, name: &str, modules: Option<&Path>) -> Result<Self> {
        if let Some((_, suite)) = SUITES.iter().find(|(supported, _)| *supported == name) {
            return Self::of_suite(workspace, name, suite);
        }
        let image = PathBuf::from(name);
        let supported = supported().collect::<Vec<_>>().join(", ");
        ensure!(image.is_file(), "{name} is none of {supported}, and no file");
        let name = image.file_name().context("a kernel's path has no name")?.to_string_lossy().into_owned();
        Ok(Self { name, image, modules: modules.map(Path::to_owned) })
    }

    fn of_suite(workspace: &Workspace, name: &str, suite: &str) -> Result<Self> {
        let directory = workspace.target.join("vm/kernels").join(name);
        if !directory.exists() {
            fetch(workspace, suite, &directory).with_context(|| format!("fetching kernel {name} from {suite}"))?;
        }
        let image = directory.join("vmlinuz");
        Ok(Self { name: name.to_owned(), image, modules: Some(directory.join("modules")) })
    }
}

/// Leaves `vmlinuz` and `modules` of the newest kernel of a suite in `directory`, or nothing.
fn fetch(workspace: &Workspace, suite: &str, directory: &Path) -> Result<()> {
    ensure!(debian::is_debian(), "kernels come from Debian, which this is not: give the path of a bzImage instead");
    println!("kernel: fetching the cloud kernel of Debian {suite}");
    let work = directory.with_extension("part");
    let _ = fs::remove_dir_all(&work);
    let apt = Apt::new(workspace, suite, &work.join("apt"))?;
    let debs = work.join("debs");
    apt.download(&apt.packages_of_one_version(PACKAGE)?, &debs)?;
    let unpacked = work.join("unpacked");
    for deb in fs::read_dir(&debs)? {
        let deb = deb?.path();
        cmd!(workspace.shell, "dpkg-deb --extract {deb} {unpacked}").quiet().run()?;
    }
    let ready = work.join("ready");
    fs::create_dir(&ready)?;
    pick(&unpacked, &ready)?;
    fs::rename(&ready, directory)?;
    Ok(fs::remove_dir_all(&work)?)
}

/// Moves the image and the modules out of unpacked packages, which have had them in two places each.
fn pick(unpacked: &Path, into: &Path) -> Result<()> {
    let modules = ["lib/modules", "usr/lib/modules"].iter().find_map(|path| only_entry(&unpacked.join(path)));
    let modules = modules.context("the packages have no modules")?;
    let release = modules.file_name().context("modules are in no directory")?.to_string_lossy().into_owned();
    let images = [unpacked.join("boot").join(format!("vmlinuz-{release}")), modules.join("vmlinuz")];
    let image = images.iter().find(|image| image.exists()).context("the packages have no kernel image")?;
    fs::rename(image, into.join("vmlinuz"))?;
    fs::rename(&modules, into.join("modules"))?;
    println!("kernel: {release}");
    Ok(fs::write(into.join("release"), release)?)
}

fn only_entry(directory: &Path) -> Option<PathBuf> {
    let mut entries = fs::read_dir(directory).ok()?;
    entries.next()?.ok().map(|entry| entry.path())
}

/// apt for one suite, with files of its own.
struct Apt<'a> {
    workspace: &'a Workspace,
    options: Vec<String>,
}

impl<'a> Apt<'a> {
    fn new(workspace: &'a Workspace, suite: &str, directory: &Path) -> Result<Self> {
        for made in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(directory.join(made))?;
        }
        let path = |name: &str| directory.join(name).display().to_string();
        fs::write(path("status"), "")?;
        fs::write(path("sources.list"), format!("deb [signed-by={}] {} {suite} main\n", debian::KEYRING, mirror()?))?;
        let options = [
            format!("-oDir::Etc::SourceList={}", path("sources.list")),
            "-oDir::Etc::SourceParts=/dev/null".into(),
            format!("-oDir::State::Lists={}", path("lists")),
            format!("-oDir::State::status={}", path("status")),
            format!("-oDir::Cache={}", path("cache")),
            "-oAcquire::Languages=none".into(),
            "-oAcquire::Retries=3".into(),
            // apt's own user cannot write below our directory.
            "-oAPT::Sandbox::User=root".into(),
        ];
        let apt = Self { workspace, options: options.into() };
        let options = &apt.options;
        cmd!(workspace.shell, "apt-get {options...} -q update").quiet().ignore_stdout().run()?;
        Ok(apt)
    }

    /// `package`, and what it demands in its own version.
    fn packages_of_one_version(&self, package: &str) -> Result<Vec<String>> {
        let mut packages = vec![package.to_owned()];
        let mut next = 0;
        while let Some(package) = packages.get(next) {
            for dependency in dependencies_of_one_version(&self.show(package)?) {
                if !packages.contains(&dependency) {
                    packages.push(dependency);
                }
            }
            next += 1;
        }
        Ok(packages)
    }

    fn show(&self, package: &str) -> Result<String> {
        let options = &self.options;
        Ok(cmd!(self.workspace.shell, "apt-cache {options...} show --no-all-versions {package}").quiet().read()?)
    }

    fn download(&self, packages: &[String], into: &Path) -> Result<()> {
        fs::create_dir_all(into)?;
        let _directory = self.workspace.shell.push_dir(into);
        let options = &self.options;
        cmd!(self.workspace.shell, "apt-get {options...} -q download {packages...}").quiet().ignore_stdout().run()?;
        Ok(())
    }
}

/// The dependencies in a package's description that must have exactly its version.
fn dependencies_of_one_version(description: &str) -> Vec<String> {
    let value = |name: &str| description.lines().find_map(|line| line.strip_prefix(name));
    let version = format!("(= {})", value("Version: ").unwrap_or_default());
    let dependencies = value("Depends: ").unwrap_or_default().split(", ");
    dependencies.filter_map(|dependency| Some(dependency.strip_suffix(&version)?.trim().to_owned())).collect()
}

/// Where this machine gets Debian from.
fn mirror() -> Result<String> {
    let parts =
        fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
    let is_source =
        |path: &PathBuf| path.extension().is_some_and(|extension| extension == "list" || extension == "sources");
    let mut files: Vec<PathBuf> = parts.filter(is_source).collect();
    files.sort();
    files.insert(0, "/etc/apt/sources.list".into());
    let found = files.iter().filter_map(|file| fs::read_to_string(file).ok()).find_map(|text| mirror_in(&text));
    let Some(mirror) = found else { bail!("no file of /etc/apt names a mirror of Debian") };
    Ok(mirror)
}

/// The first mirror of Debian's main archive in a sources file of either format.
fn mirror_in(text: &str) -> Option<String> {
    let lines = text.lines().filter(|line| line.starts_with("URIs:") || line.starts_with("deb "));
    // Not `…/debian-security`; images for clouds name a file with a list of mirrors instead.
    let is_main = |uri: &&str| {
        let uri = uri.trim_end_matches('/');
        uri.contains(":/") && (uri.ends_with("/debian") || uri.ends_with("/debian.list"))
    };
    lines.flat_map(str::split_whitespace).find(is_main).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_found_in_both_formats_and_is_not_that_of_security() {
        let cases = [
            ("deb822", "Types: deb\nURIs: http://n.org/debian-security\n\nURIs: http://m.org/debian\n"),
            ("one line", "# deb http://old.org/debian x main\ndeb [arch=amd64] http://m.org/debian bookworm main\n"),
        ];
        for (name, text) in cases {
            assert_eq!(mirror_in(text).as_deref(), Some("http://m.org/debian"), "{name}");
        }
        assert_eq!(mirror_in("deb https://packages.cloud.google.com/apt cloud-sdk main"), None);
    }

    #[test]
    fn a_list_of_mirrors_is_a_mirror() {
        let text = "URIs: mirror+file:///etc/apt/mirrors/debian.list\n";
        assert_eq!(mirror_in(text).as_deref(), Some("mirror+file:///etc/apt/mirrors/debian.list"));
    }

    #[test]
    fn only_what_must_have_the_same_version_belongs_to_the_kernel() {
        let description = "Package: linux-image-7.2.13+deb14-cloud-amd64\nVersion: 7.2.13-1\n\
            Depends: dracut | initramfs-tools (>= 0.120), linux-binary-7.2.13 (= 7.2.13-1), linux-modules-7.2.13 (= 7.2.13-1)\n";
        assert_eq!(dependencies_of_one_version(description), ["linux-binary-7.2.13", "linux-modules-7.2.13"]);
    }
}
