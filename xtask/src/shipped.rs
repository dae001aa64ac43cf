//! What is shipped around the agent, looked at with the tools of others, as far as they are there: helm, kubeconform,
//! kubectl and mdbook. What needs none of them are unit tests of the agent.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use xshell::cmd;

use crate::{machine, workspace::Workspace};

/// The manifest for who has no helm.
const MANIFEST: &str = "deploy/sluice.yaml";
const CHART: &str = "charts/sluice";
/// What makes it.
const RENDER: [&str; 5] = ["template", "sluice", CHART, "--namespace", "kube-system"];

/// A tool, what it shows, and how.
type Check = (&'static str, &'static str, fn(&Workspace) -> Result<()>);
/// One that is asked for by itself, too.
const BOOK: Check = ("mdbook", "that docs/ is a book", build_book);

pub(crate) fn check(workspace: &Workspace) -> Result<()> {
    let checks: [Check; 4] = [
        ("helm", "that deploy/sluice.yaml is what charts/sluice renders", render),
        ("kubeconform", "that deploy/sluice.yaml has the shape that the API's schemas ask for", conform),
        ("kubectl", "that deploy/ is a base for kustomize", customize),
        BOOK,
    ];
    checks.into_iter().try_for_each(|check| with_tool(workspace, check))
}

/// The book, where there is mdbook.
pub(crate) fn book(workspace: &Workspace) -> Result<()> {
    with_tool(workspace, BOOK)
}

fn with_tool(workspace: &Workspace, (tool, what, check): Check) -> Result<()> {
    if machine::in_path(tool).is_some() {
        return check(workspace);
    }
    println!("check: there is no {tool} here; it is not checked {what}");
    Ok(())
}

fn render(workspace: &Workspace) -> Result<()> {
    let shell = &workspace.shell;
    cmd!(shell, "helm lint --strict {CHART}").run()?;
    let rendered = documents(&cmd!(shell, "helm").args(RENDER).read()?)?;
    let committed = documents(&fs::read_to_string(workspace.root.join(MANIFEST))?).context(MANIFEST)?;
    for values in fs::read_dir(workspace.root.join(CHART).join("ci"))? {
        let values = values?.path();
        cmd!(shell, "helm").args(RENDER).arg("--values").arg(values).ignore_stdout().run()?;
    }
    let command = RENDER.join(" ");
    ensure!(rendered == committed, "{MANIFEST} is not what the chart renders: `helm {command}` makes it");
    Ok(())
}

fn conform(workspace: &Workspace) -> Result<()> {
    Ok(cmd!(workspace.shell, "kubeconform -strict -summary {MANIFEST}").run()?)
}

fn customize(workspace: &Workspace) -> Result<()> {
    let made = documents(&cmd!(workspace.shell, "kubectl kustomize deploy").read()?)?;
    let committed = documents(&fs::read_to_string(workspace.root.join(MANIFEST))?)?;
    ensure!(made == committed, "deploy/kustomization.yaml does not leave {MANIFEST} as it is");
    Ok(())
}

fn build_book(workspace: &Workspace) -> Result<()> {
    let target = workspace.target.join("book");
    Ok(cmd!(workspace.shell, "mdbook build docs --dest-dir {target}").run()?)
}

/// The objects of a YAML text, in the order of their kinds and names.
fn documents(text: &str) -> Result<Vec<Value>> {
    let mut documents: Vec<Value> = serde_saphyr::from_multiple(text)?;
    documents.sort_by_key(|document| (document["kind"].to_string(), document["metadata"]["name"].to_string()));
    Ok(documents)
}

#[cfg(test)]
mod tests {
    use super::documents;

    #[test]
    fn objects_are_compared_whatever_their_order_and_what_is_said_beside_them() {
        let one = "# made by hand\n---\nkind: B\nmetadata: {name: x}\n---\nkind: A\nmetadata: {name: x}\n";
        let other = "kind: A\nmetadata:\n  name: x\n---\n# Source: b\nkind: B\nmetadata:\n  name: x\n";
        assert_eq!(documents(one).unwrap(), documents(other).unwrap());
        assert_ne!(documents(one).unwrap(), documents(&other.replace("kind: B", "kind: C")).unwrap());
    }
}
