//! The Kubernetes source against the fake API server: what it knows, when, and what it keeps when things go wrong.

use std::{collections::BTreeMap, future::Future, time::Duration};

use anyhow::{Context as _, Result, bail};
use proxy_userspace::{
    config,
    metrics::Metrics,
    model::ObjectName,
    source::{
        Change, Event, QUEUE,
        kubernetes::{self, OpenError, Watches},
    },
};
use serde_json::{Value, json};
use tests::{
    api::{ApiServer, Fault, On, Resource, Verb},
    patience::{patience, wait_until},
};
use tokio::sync::mpsc::{Receiver, channel};

const DEADLINE: Duration = Duration::from_secs(15);

fn block_on<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(future)
}

fn service(name: &str, cluster_ip: &str) -> Value {
    json!({
        "kind": "Service",
        "metadata": {"namespace": "test", "name": name},
        "spec": {"clusterIP": cluster_ip, "clusterIPs": [cluster_ip], "ports": [{"port": 80}], "type": "ClusterIP"},
        "status": {"loadBalancer": {}},
    })
}

fn slice(name: &str) -> Value {
    json!({
        "kind": "EndpointSlice",
        "metadata": {"namespace": "test", "name": name, "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "endpoints": null,
        "ports": null,
    })
}

fn node(name: &str) -> Value {
    json!({"kind": "Node", "metadata": {"name": name}, "spec": {}, "status": {}})
}

/// A server with three Services, a slice and two nodes.
fn server() -> Result<ApiServer> {
    let server = ApiServer::start()?;
    for name in ["a", "b", "c"] {
        server.apply(service(name, "10.96.0.1"))?;
    }
    server.apply(slice("web-1"))?;
    server.apply(node("here"))?;
    server.apply(node("there"))?;
    Ok(server)
}

/// What the source has told so far.
#[derive(Debug)]
struct Known {
    events: Receiver<Event>,
    services: Objects,
    slices: Objects,
    nodes: Objects,
    peers: Objects,
    cidrs: Objects,
    /// What was wrong beside that.
    defects: Vec<String>,
}

/// Names and resource versions.
#[derive(Debug, Default)]
struct Objects {
    /// None: no complete list has come.
    known: Option<BTreeMap<String, String>>,
    /// Of a list that is not complete.
    listed: BTreeMap<String, String>,
    /// Sizes of the lists that came.
    lists: Vec<usize>,
}

impl Objects {
    fn absorb<T: kube::Resource<DynamicType = ()>>(&mut self, change: Change<T>) {
        let entry = |object: &T| {
            let metadata = object.meta().clone();
            (metadata.name.unwrap_or_default(), metadata.resource_version.unwrap_or_default())
        };
        match change {
            Change::Replace(list) => self.replace(list.iter().map(entry).collect()),
            Change::Begin => self.listed.clear(),
            Change::Listed(object) => self.listed.extend([entry(&object)]),
            Change::End => {
                let listed = std::mem::take(&mut self.listed);
                self.replace(listed);
            }
            Change::Apply(object) => self.known.get_or_insert_default().extend([entry(&object)]),
            Change::Delete(ObjectName { name, .. }) => drop(self.known.get_or_insert_default().remove(&*name)),
        }
    }

    fn replace(&mut self, objects: BTreeMap<String, String>) {
        self.lists.push(objects.len());
        self.known = Some(objects);
    }

    fn has(&self, names: &[&str]) -> bool {
        self.known.as_ref().is_some_and(|known| known.keys().eq(names))
    }
}

impl Known {
    async fn from(url: &str, watches: Watches) -> Result<Self> {
        let (sender, events) = channel(QUEUE);
        let server = config::ApiServer { urls: vec![url.to_owned()], ..config::ApiServer::default() };
        kubernetes::start_with(&kubernetes::client(&server).await?, "here", watches, &sender, &Metrics::default());
        let [services, slices, nodes, peers, cidrs] = std::array::from_fn(|_| Objects::default());
        Ok(Self { events, services, slices, nodes, peers, cidrs, defects: Vec::new() })
    }

    /// Takes events in until the condition holds.
    async fn until(&mut self, what: &str, condition: impl Fn(&Self) -> bool) -> Result<()> {
        let deadline = tokio::time::Instant::now() + patience(DEADLINE);
        while !condition(self) {
            let Ok(event) = tokio::time::timeout_at(deadline, self.events.recv()).await else {
                bail!("waited in vain for {what}; known: {self:?}");
            };
            self.absorb(event.context("the source ended")?);
        }
        Ok(())
    }

    fn absorb(&mut self, event: Event) {
        match event {
            Event::Services(change) => self.services.absorb(change),
            Event::EndpointSlices(change) => self.slices.absorb(change),
            Event::Nodes(change) => self.nodes.absorb(change),
            Event::Peers(change) => self.peers.absorb(change),
            Event::ServiceCidrs(change) => self.cidrs.absorb(change),
            Event::Defect(defect) => self.defects.push(defect.to_string()),
        }
    }

    fn has_services(&self, names: &[&str]) -> bool {
        self.services.has(names)
    }

    /// Sizes of the lists of Services that came.
    fn lists(&self) -> &[usize] {
        &self.services.lists
    }
}

fn small_pages() -> Watches {
    Watches { page_size: 2, ..Watches::default() }
}

#[test]
fn lists_come_as_streams_and_only_what_a_proxy_serves() -> Result<()> {
    block_on(async {
        let server = server()?;
        let mut labelled = service("other", "10.96.0.9");
        labelled["metadata"]["labels"] = json!({"service.kubernetes.io/service-proxy-name": ""});
        server.apply(labelled)?;
        server.apply(service("headless", "None"))?;
        let mut known = Known::from(&server.url(), Watches::default()).await?;
        known
            .until("all lists", |known| {
                known.services.known.is_some() && known.slices.known.is_some() && known.nodes.known.is_some()
            })
            .await?;
        assert!(known.has_services(&["a", "b", "c"]), "{known:?}");
        assert!(known.nodes.has(&["here"]), "only the own node: {known:?}");
        assert!(server.requests().iter().all(|request| request.verb == Verb::Watch), "{:?}", server.requests());
        Ok(())
    })
}

#[test]
fn other_nodes_are_watched_when_somebody_asks_for_them() -> Result<()> {
    block_on(async {
        let server = server()?;
        let (sender, events) = channel(QUEUE);
        let settings = config::ApiServer { urls: vec![server.url()], ..config::ApiServer::default() };
        let client = kubernetes::client(&settings).await?;
        kubernetes::watch_peers(&client, "here", Watches::default(), &sender, &Metrics::default());
        let mut known = Known { events, ..Known::from(&server.url(), Watches::default()).await? };
        known.until("all Nodes", |known| known.peers.has(&["here", "there"])).await?;
        server.apply(node("new"))?;
        known.until("another Node", |known| known.peers.has(&["here", "new", "there"])).await?;
        assert!(known.nodes.known.is_none(), "told apart from the own one: {known:?}");
        Ok(())
    })
}

#[test]
fn a_server_without_streaming_lists_is_asked_for_pages() -> Result<()> {
    block_on(async {
        let server = server()?;
        server.refuse_streaming_lists();
        let mut known = Known::from(&server.url(), small_pages()).await?;
        known.until("three Services", |known| known.has_services(&["a", "b", "c"])).await?;
        assert_eq!(known.lists(), [3]);
        let requests = server.requests();
        let pages =
            requests.iter().filter(|request| (request.resource, request.verb) == (Resource::Services, Verb::List));
        assert_eq!(pages.count(), 2, "{requests:?}");
        Ok(())
    })
}

#[test]
fn changes_follow_as_they_happen() -> Result<()> {
    block_on(async {
        let server = server()?;
        let mut known = Known::from(&server.url(), Watches::default()).await?;
        known.until("the list", |known| known.has_services(&["a", "b", "c"])).await?;
        server.apply(service("d", "10.96.0.4"))?;
        known.until("an addition", |known| known.has_services(&["a", "b", "c", "d"])).await?;
        server.delete(Resource::Services, "test", "a")?;
        known.until("a deletion", |known| known.has_services(&["b", "c", "d"])).await?;
        let mut labelled = service("b", "10.96.0.1");
        labelled["metadata"]["labels"] = json!({"service.kubernetes.io/service-proxy-name": "other"});
        server.apply(labelled)?;
        known.until("one that goes to another proxy", |known| known.has_services(&["c", "d"])).await?;
        assert_eq!(known.lists(), [3], "no list but the first");
        Ok(())
    })
}

#[test]
fn a_watch_that_ends_goes_on_where_it_was() -> Result<()> {
    block_on(async {
        let server = server()?;
        let mut known = Known::from(&server.url(), Watches::default()).await?;
        known.until("the list", |known| known.has_services(&["a", "b", "c"])).await?;
        server.apply(service("d", "10.96.0.4"))?;
        server.bookmark();
        server.end_watches();
        server.apply(service("e", "10.96.0.5"))?;
        known.until("both additions", |known| known.has_services(&["a", "b", "c", "d", "e"])).await?;
        assert_eq!(known.lists(), [3], "no list but the first");
        Ok(())
    })
}

#[test]
fn after_410_a_new_list_replaces_the_old_one_at_once() -> Result<()> {
    block_on(async {
        let server = server()?;
        server.refuse_streaming_lists();
        let mut known = Known::from(&server.url(), small_pages()).await?;
        known.until("the list", |known| known.has_services(&["a", "b", "c"])).await?;
        server.end_watches();
        server.delete(Resource::Services, "test", "a")?;
        server.apply(service("z", "10.96.0.26"))?;
        server.compact();
        known.until("the new list", |known| known.has_services(&["b", "c", "z"])).await?;
        // Nothing in between: the changes may have come as events before the compaction, but never half a list.
        assert!(known.lists().iter().all(|size| *size == 3), "{known:?}");
        Ok(())
    })
}

#[test]
fn a_page_that_breaks_off_changes_nothing() -> Result<()> {
    block_on(async {
        let server = server()?;
        server.refuse_streaming_lists();
        server.inject(On::next_page(Resource::Services), Fault::BreakOff, 2);
        let mut known = Known::from(&server.url(), small_pages()).await?;
        known.until("the list", |known| known.has_services(&["a", "b", "c"])).await?;
        assert_eq!(known.lists(), [3], "half a list was told");
        Ok(())
    })
}

#[test]
fn a_list_that_expires_between_its_pages_begins_anew() -> Result<()> {
    block_on(async {
        let server = server()?;
        server.refuse_streaming_lists();
        server.inject(On::next_page(Resource::Services), Fault::Refuse(410), 1);
        let mut known = Known::from(&server.url(), small_pages()).await?;
        known.until("the list", |known| known.has_services(&["a", "b", "c"])).await?;
        assert_eq!(known.lists(), [3]);
        Ok(())
    })
}

#[test]
fn a_server_that_falls_silent_is_given_up_and_asked_again() -> Result<()> {
    block_on(async {
        let server = server()?;
        server.inject(On::watch(Resource::Services), Fault::Stall, 1);
        let mut known = Known::from(&server.url(), Watches { timeout: 1, ..Watches::default() }).await?;
        known.until("the list", |known| known.has_services(&["a", "b", "c"])).await
    })
}

#[test]
fn one_resource_that_is_forbidden_does_not_hold_up_the_others() -> Result<()> {
    block_on(async {
        let server = server()?;
        server.inject(On::all(Resource::Nodes), Fault::Refuse(403), usize::MAX);
        let mut known = Known::from(&server.url(), Watches::default()).await?;
        known
            .until("Services and slices", |known| known.services.known.is_some() && known.slices.known.is_some())
            .await?;
        assert_eq!(known.nodes.known, None);
        server.heal();
        known.until("the node", |known| known.nodes.known.is_some()).await
    })
}

#[test]
fn a_server_without_service_cidrs_does_not_hold_up_the_others_and_may_get_them_later() -> Result<()> {
    block_on(async {
        for code in [403, 404] {
            let server = server()?;
            server.inject(On::all(Resource::ServiceCidrs), Fault::Refuse(code), usize::MAX);
            let mut known = Known::from(&server.url(), Watches::default()).await?;
            let is_known = |known: &Known| {
                known.services.known.is_some() && known.slices.known.is_some() && known.nodes.known.is_some()
            };
            known.until("all else", is_known).await?;
            assert_eq!(known.cidrs.known, None, "{code}");
            // Who asks again was refused.
            let asked =
                || server.requests().iter().filter(|request| request.resource == Resource::ServiceCidrs).count();
            wait_until("a second question", DEADLINE, || (asked() >= 2).then_some(()))?;
            let cidr =
                json!({"kind": "ServiceCIDR", "metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/16"]}});
            server.apply(cidr)?;
            server.heal();
            known
                .until("the ServiceCIDR", |known| known.cidrs.known.as_ref().is_some_and(|cidrs| cidrs.len() == 1))
                .await?;
            // A server that is older than they are is nobody's mistake.
            let is_told = known.defects.iter().any(|defect| defect.contains("ServiceCIDR"));
            assert_eq!(is_told, code == 403, "{code}: {:?}", known.defects);
        }
        Ok(())
    })
}

#[test]
fn errors_of_every_kind_are_survived() -> Result<()> {
    block_on(async {
        let server = server()?;
        let mut known = Known::from(&server.url(), Watches::default()).await?;
        known.until("the list", |known| known.has_services(&["a", "b", "c"])).await?;
        for code in [401, 410, 429, 500] {
            server.inject(On::watch(Resource::Services), Fault::Refuse(code), 1);
        }
        server.end_watches();
        server.apply(service("d", "10.96.0.4"))?;
        known.until("an addition", |known| known.has_services(&["a", "b", "c", "d"])).await
    })
}

#[test]
fn a_server_that_comes_late_is_found() -> Result<()> {
    block_on(async {
        let address = ApiServer::start()?.address();
        let mut known = Known::from(&format!("http://{address}"), Watches::default()).await?;
        let early = known.until("nothing", |known| known.services.known.is_some());
        let early = tokio::time::timeout(Duration::from_millis(300), early).await;
        assert!(early.is_err(), "a list without a server: {early:?}");
        let server = ApiServer::start_at(address)?;
        server.apply(service("a", "10.96.0.1"))?;
        known.until("the Service", |known| known.has_services(&["a"])).await
    })
}

#[test]
fn objects_come_without_what_nobody_reads() -> Result<()> {
    block_on(async {
        let server = ApiServer::start()?;
        let mut annotated = service("a", "10.96.0.1");
        annotated["metadata"]["managedFields"] = json!([{"manager": "kubectl"}]);
        annotated["metadata"]["annotations"] = json!({"team": "shop", "service.sluice.dev/algorithm": "maglev"});
        server.apply(annotated)?;
        let mut known = Known::from(&server.url(), Watches::default()).await?;
        let service = loop {
            let event = known.events.recv().await.context("the source ended")?;
            if let Event::Services(Change::Listed(object)) = event {
                break object;
            }
        };
        let metadata = service.metadata;
        assert!(metadata.managed_fields.is_none_or(|fields| fields.is_empty()));
        let annotations = metadata.annotations.context("no annotations")?;
        assert!(annotations.keys().eq(["service.sluice.dev/algorithm"]), "{annotations:?}");
        Ok(())
    })
}

#[test]
fn an_object_that_cannot_be_read_does_not_hide_the_others() -> Result<()> {
    block_on(async {
        for has_streams in [true, false] {
            let server = server()?;
            if !has_streams {
                server.refuse_streaming_lists();
            }
            let broken = |name: &str| {
                let mut broken = service(name, "10.96.0.9");
                broken["spec"]["ports"] = json!([{"port": "eighty"}]);
                broken
            };
            server.apply(broken("bad"))?;
            let mut known = Known::from(&server.url(), small_pages()).await?;
            known.until("the list", |known| known.has_services(&["a", "b", "c"])).await?;
            server.apply(broken("b"))?;
            known.until("one that broke to be left out", |known| known.has_services(&["a", "c"])).await?;
            server.apply(service("bad", "10.96.0.9"))?;
            known.until("one that was mended", |known| known.has_services(&["a", "bad", "c"])).await?;
            assert_eq!(known.lists(), [3], "no list but the first");
            assert_eq!(known.defects.len(), 2, "{:?}", known.defects);
            let named = |name| format!("Service test/{name}: cannot be read and is left out: ");
            assert!(known.defects[0].starts_with(&named("bad")) && known.defects[1].starts_with(&named("b")));
        }
        Ok(())
    })
}

#[test]
fn a_kubeconfig_is_followed_and_one_that_cannot_be_read_is_an_error_that_names_it() -> Result<()> {
    block_on(async {
        let (server, directory) = (server()?, tempfile::tempdir()?);
        let kubeconfig = server.write_kubeconfig(directory.path())?;
        let (sender, mut events) = channel(QUEUE);
        let good = config::ApiServer { kubeconfig: Some(kubeconfig), ..config::ApiServer::default() };
        kubernetes::start(&good, "here", sender.clone(), &Metrics::default()).await?;
        events.recv().await.context("the source ended")?;
        let missing = directory.path().join("missing");
        let bad = config::ApiServer { kubeconfig: Some(missing.clone()), ..config::ApiServer::default() };
        let error = kubernetes::start(&bad, "here", sender, &Metrics::default()).await.map(drop).unwrap_err();
        assert!(matches!(error, OpenError::Kubeconfig { .. }));
        assert!(error.to_string().contains(&missing.display().to_string()), "{error}");
        Ok(())
    })
}
