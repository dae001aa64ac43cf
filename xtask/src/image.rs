//! `image`: the agent as an OCI image, in one archive, without a docker daemon. The binary is static and alone in it.

mod archive;
mod binary;
mod content;

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use xshell::cmd;

use self::{
    archive::Description,
    content::{Content, Layer},
};
use crate::{
    setup,
    workspace::{Executable, Workspace},
};

/// Make an OCI image of the agent, as an archive.
#[derive(Args)]
pub(crate) struct Arguments {
    /// What the image is called; its tag is the version.
    #[arg(long, default_value = "localhost/sluice")]
    name: String,
    /// Where to write it [default: target/image/sluice-VERSION.tar]
    #[arg(long)]
    output: Option<PathBuf>,
    /// A second image besides, `VERSION-debug`: with a shell, bpftool, ip and tc of this machine.
    #[arg(long)]
    debug: bool,
}

/// The only kind of machine the agent is built for.
const TARGET: &str = "x86_64-unknown-linux-gnu";

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    setup::ensure(workspace, &[setup::BPF])?;
    let agent = build(workspace)?;
    let directory = workspace.target.join("image");
    fs::create_dir_all(&directory)?;
    // Where the Dockerfile looks for it.
    fs::copy(&agent, directory.join("sluice"))?;
    let mut layers = vec![Layer::of_agent(&fs::read(&agent)?)?];
    let description = Description::new(&arguments.name, env!("CARGO_PKG_VERSION"), revision(workspace));
    let output = arguments.output.clone();
    let output = output.unwrap_or_else(|| directory.join(format!("sluice-{}.tar", env!("CARGO_PKG_VERSION"))));
    write(&output, &description, &layers)?;
    if arguments.debug {
        setup::ensure(workspace, &[setup::KERNEL, setup::VM])?;
        layers.push(Layer::of_tools(&workspace.shell)?);
        let tagged = output.with_extension("").into_os_string().into_string().ok().context("a name of letters")?;
        write(&PathBuf::from(format!("{tagged}-debug.tar")), &description.for_debugging(), &layers)?;
    }
    Ok(())
}

/// The agent, linked with everything it needs. A target that is named keeps its flags from the programs of the build.
fn build(workspace: &Workspace) -> Result<PathBuf> {
    let arguments = ["build", "--package", "proxy-userspace", "--bin", "sluice", "--release", "--target", TARGET];
    let cargo = workspace.cargo(&arguments).args(["--config", "profile.release.strip=true"]);
    let built = Executable::all(cargo.env("RUSTFLAGS", "-Ctarget-feature=+crt-static"))?;
    let agent = built.into_iter().next().context("building the agent made no program")?.path;
    let parts = binary::dynamic(&fs::read(&agent)?)?;
    ensure!(parts.is_empty(), "{} is not static: it has {}", agent.display(), parts.join(", "));
    Ok(agent)
}

/// What the sources are, if that is known.
fn revision(workspace: &Workspace) -> Option<String> {
    let shell = &workspace.shell;
    let head = cmd!(shell, "git rev-parse HEAD").quiet().ignore_stderr().read().ok()?;
    let is_clean = cmd!(shell, "git diff --quiet HEAD").quiet().ignore_stderr().run().is_ok();
    Some(if is_clean { head } else { format!("{head}-dirty") })
}

fn write(output: &PathBuf, description: &Description, layers: &[Layer]) -> Result<()> {
    fs::write(output, archive::archive(description, layers)?)?;
    // What was written is what others read.
    let content = Content::read(&fs::read(output)?).with_context(|| format!("{} is wrong", output.display()))?;
    let (file, name) = (output.display(), description.reference());
    println!("{file}: {name}, {} files, {} KiB", content.files.len(), fs::metadata(output)?.len() / 1024);
    println!("  containerd   ctr --namespace k8s.io images import {file}");
    println!("  k3s          k3s ctr images import {file}");
    println!("  kind         kind load image-archive {file}");
    println!("  podman       podman load --input {file}");
    println!("  a registry   skopeo copy oci-archive:{file} docker://REGISTRY/sluice:{}", description.tag());
    Ok(())
}
