//! The connection to the API server: where it is, who we are, and how soon a dead peer is noticed.

use std::{collections::HashSet, path::Path, time::Duration};

use http::Uri;
use hyper_util::{
    client::legacy::{Client as HttpClient, connect::HttpConnector},
    rt::TokioExecutor,
};
use kube::{
    Client, Config,
    client::{Body, ClientBuilder, ConfigExt as _, middleware::BaseUriLayer},
    config::{InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError},
};
use tower::ServiceBuilder;

use super::{
    memory::Remembered,
    servers::{Connection, Servers},
};
use crate::config::ApiServer;

/// An idle connection is probed this often in the time after which a silent peer is given up: a watch may have nothing to
/// say for minutes.
const PROBES: u32 = 3;
/// For the handshake.
const CONNECT: Duration = Duration::from_secs(10);
/// For the handshake when there is another server to turn to.
const CONNECT_ONE_OF_SEVERAL: Duration = Duration::from_secs(3);

/// Why the API server's whereabouts are not known.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No kubeconfig that can be read.
    #[error("the kubeconfig {path} cannot be used: {source}; correct --kubeconfig, or use --source=file:DIR without a cluster", path = .path.display())]
    Kubeconfig {
        /// As given.
        path: std::path::PathBuf,
        /// What is wrong.
        source: Box<KubeconfigError>,
    },
    /// Neither in a pod nor told.
    #[error("not in a cluster ({0}): name the API server with --kubeconfig or --master, or use --source=file:DIR")]
    NotInCluster(#[source] InClusterError),
    /// Not a URL.
    #[error("--master {url:?} is not a URL: {source}")]
    Master {
        /// As given.
        url: String,
        /// What is wrong.
        source: http::uri::InvalidUri,
    },
    /// Certificates or credentials.
    #[error("the credentials for the API server cannot be used: {0}")]
    Credentials(#[source] Box<kube::Error>),
}

/// A client for the API server. It connects when it is used.
pub(super) async fn open(settings: &ApiServer) -> Result<Client, OpenError> {
    // What is wrong with the settings is told now; what goes wrong later names the kind of object, not the server.
    let config = configuration(settings).await?;
    let servers = servers(&config, settings)?;
    for server in &servers {
        build(&config, server, servers.len(), settings).map_err(|source| OpenError::Credentials(Box::new(source)))?;
        tracing::info!(server = %server.url, by = server.source, "the API server is");
    }
    Ok(ClientBuilder::new(Servers::new(settings.clone()), config.default_namespace).build())
}

/// What the files say now.
pub(super) async fn configuration(settings: &ApiServer) -> Result<Config, OpenError> {
    let urls = urls(settings)?;
    match (&settings.kubeconfig, urls.first()) {
        (Some(path), _) => from_kubeconfig(path).await,
        (None, Some(url)) => Ok(Config::incluster().unwrap_or_else(|_| Config::new(url.clone()))),
        (None, None) => Config::incluster().map_err(OpenError::NotInCluster),
    }
}

/// A server that may be asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Server {
    pub(super) url: Uri,
    /// Whom its certificate must name, if not the URL's host.
    pub(super) name: Option<String>,
    /// Who has told of it.
    source: &'static str,
}

/// The servers that may be asked, in the order in which they are: never none. A kubeconfig is alone with the URLs before it; its
/// credentials are nobody else's. A pod has, after the URLs, what an agent before it has remembered, what its variables say, and
/// what a bootstrap file says.
pub(super) fn servers(config: &Config, settings: &ApiServer) -> Result<Vec<Server>, OpenError> {
    let named = |url, source| Server { url, name: None, source };
    let mut servers: Vec<Server> = urls(settings)?.into_iter().map(|url| named(url, "--master")).collect();
    if settings.kubeconfig.is_some() {
        if servers.is_empty() {
            servers.push(named(config.cluster_url.clone(), "--kubeconfig"));
        }
        return Ok(servers);
    }
    let is_in_pod = servers.first().is_none_or(|server| server.url != config.cluster_url);
    if is_in_pod {
        servers.extend(remembered(config, settings));
        servers.push(named(config.cluster_url.clone(), "KUBERNETES_SERVICE_HOST"));
    }
    servers.extend(bootstrap(settings).map(|url| named(url, "--bootstrap-kubeconfig")));
    let mut seen = HashSet::new();
    servers.retain(|server| seen.insert(server.url.clone()));
    Ok(servers)
}

/// The endpoints behind the ClusterIP. Their certificates name it: they need not name the endpoints.
fn remembered(config: &Config, settings: &ApiServer) -> Vec<Server> {
    let Some(directory) = &settings.state else { return Vec::new() };
    let name = config.cluster_url.host().map(|host| host.trim_matches(['[', ']']).to_owned());
    let endpoints = Remembered::read(directory).endpoints().into_iter();
    let urls = endpoints.filter_map(|endpoint| format!("https://{endpoint}").parse().ok());
    urls.map(|url| Server { url, name: name.clone(), source: "--state-dir" }).collect()
}

/// The server of a kubeconfig without its credentials, which are not ours.
fn bootstrap(settings: &ApiServer) -> Option<Uri> {
    let path = settings.bootstrap.as_deref().filter(|path| path.exists())?;
    let told = |error: &dyn std::fmt::Display| {
        tracing::warn!("{}: {error}; it names no API server", path.display());
    };
    let kubeconfig = Kubeconfig::read_from(path).inspect_err(|error| told(error)).ok()?;
    let current = kubeconfig.contexts.iter().find(|context| Some(&context.name) == kubeconfig.current_context.as_ref());
    let named = current.and_then(|context| context.context.as_ref()).map(|context| &context.cluster);
    // That of the ConfigMap `cluster-info` has neither context nor name.
    let cluster = kubeconfig.clusters.iter().find(|cluster| named.is_none_or(|name| *name == cluster.name));
    let server = cluster.and_then(|cluster| cluster.cluster.as_ref()?.server.clone());
    let server = server.or_else(|| {
        told(&"it has no cluster with a server");
        None
    })?;
    let url: Uri = server.parse().inspect_err(|error| told(error)).ok()?;
    // Whoever listens on the way would learn the service account's token.
    if url.scheme() != Some(&http::uri::Scheme::HTTPS) {
        told(&format_args!("{url} is not https"));
        return None;
    }
    Some(url)
}

fn urls(settings: &ApiServer) -> Result<Vec<Uri>, OpenError> {
    let parse = |url: &String| url.parse().map_err(|source| OpenError::Master { url: url.clone(), source });
    settings.urls.iter().map(parse).collect()
}

async fn from_kubeconfig(path: &Path) -> Result<Config, OpenError> {
    let error = |source| OpenError::Kubeconfig { path: path.into(), source: Box::new(source) };
    let kubeconfig = Kubeconfig::read_from(path).map_err(error)?;
    Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.map_err(error)
}

/// kube's own stack on a connector that notices a peer that is gone without a word. The server is one of so many.
pub(super) fn build(
    config: &Config,
    server: &Server,
    of: usize,
    settings: &ApiServer,
) -> Result<Connection, kube::Error> {
    let mut config = config.clone();
    config.tls_server_name = server.name.clone().or(config.tls_server_name);
    let connector = config.rustls_https_connector_with_connector(connector(settings, of))?;
    let service = ServiceBuilder::new()
        .layer(BaseUriLayer::new(server.url.clone()))
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(tower::BoxError::from)
        .service(HttpClient::builder(TokioExecutor::new()).build::<_, Body>(connector));
    Ok(Connection::new(service))
}

fn connector(settings: &ApiServer, servers: usize) -> HttpConnector {
    let probe = settings.silence / PROBES;
    let connect = if servers > 1 { CONNECT_ONE_OF_SEVERAL } else { CONNECT };
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector.set_nodelay(true);
    connector.set_connect_timeout(Some(connect));
    connector.set_keepalive(Some(probe));
    connector.set_keepalive_interval(Some(probe));
    connector.set_tcp_user_timeout(Some(settings.silence));
    connector
}
