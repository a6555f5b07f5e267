//! One bucket of an S3-compatible store, as the cargo feature `s3` brings it.

use std::pin::Pin;

use anyhow::Context as _;
use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::client::{
    ClientOptions, HttpClient, HttpConnector, HttpError, HttpRequest, HttpResponse, HttpService,
};
use object_store::path::Path;
use object_store::{GetResult, ObjectStoreExt, RetryConfig};

use super::BlobId;
use crate::config::S3;
use crate::http_client::{self, Redirects};

pub struct Bucket {
    store: AmazonS3,
    prefix: String,
}

/// A file that the bucket has begun to send.
pub struct Object(GetResult);

impl Object {
    /// In bytes.
    pub fn size(&self) -> u64 {
        self.0.meta.size
    }

    pub async fn content(self) -> anyhow::Result<Bytes> {
        Ok(self.0.bytes().await?)
    }
}

impl Bucket {
    pub fn new(s3: &S3) -> anyhow::Result<Self> {
        let text = |secret: &crate::config::secret::Secret| {
            String::from_utf8(secret.expose().to_vec()).context("expected ASCII in the keys")
        };
        let mut builder = AmazonS3Builder::new()
            .with_bucket_name(&s3.bucket)
            .with_region(&s3.region)
            .with_access_key_id(text(&s3.access_key)?)
            .with_secret_access_key(text(&s3.secret_key)?)
            // Builds do not wait for it.
            .with_retry(RetryConfig {
                max_retries: 1,
                ..RetryConfig::default()
            })
            .with_http_connector(OurClient);
        if let Some(endpoint) = &s3.endpoint {
            builder = builder
                .with_endpoint(endpoint.as_str().trim_end_matches('/'))
                .with_allow_http(endpoint.scheme() == "http");
        }
        Ok(Self {
            store: builder.build()?,
            prefix: s3.prefix.clone(),
        })
    }

    /// The file, if there is one.
    pub async fn get(&self, id: &BlobId) -> anyhow::Result<Option<Object>> {
        match self.store.get(&self.path(id)).await {
            Ok(found) => Ok(Some(Object(found))),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    pub async fn has(&self, id: &BlobId) -> anyhow::Result<bool> {
        match self.store.head(&self.path(id)).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    pub async fn put(&self, id: &BlobId, content: Vec<u8>) -> anyhow::Result<()> {
        self.store.put(&self.path(id), content.into()).await?;
        Ok(())
    }

    fn path(&self, id: &BlobId) -> Path {
        let name = id.digest.to_string();
        let prefix = self.prefix.split('/').filter(|part| !part.is_empty());
        let parts = prefix.chain([&*id.space, &name[..2], &name]);
        Path::from_iter(parts)
    }
}

/// The HTTP client that everything else uses as well.
#[derive(Debug)]
struct OurClient;

impl HttpConnector for OurClient {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        let client = http_client::client(Redirects::SameOrigin);
        let client = client.map_err(|error| object_store::Error::Generic {
            store: "S3",
            source: error.into(),
        })?;
        Ok(HttpClient::new(OnlyStatuses(client)))
    }
}

/// Of an error, what is read for the sake of the connection, which is used again when all has been read.
const MOST_OF_AN_ERROR: usize = 16 << 10;

/// SECURITY: gives the status of an error and not what the server writes about it, which is no secret's place: AWS answers
/// wrong keys with the name of the key and all that was signed, and errors go to the log.
#[derive(Debug)]
struct OnlyStatuses(reqwest::Client);

impl HttpService for OnlyStatuses {
    fn call<'a, 'b>(
        &'a self,
        request: HttpRequest,
    ) -> Pin<Box<dyn Future<Output = Result<HttpResponse, HttpError>> + Send + 'b>>
    where
        'a: 'b,
        Self: 'b,
    {
        Box::pin(async move {
            let response = self.0.call(request).await?;
            let status = response.status();
            if !status.is_client_error() && !status.is_server_error() {
                return Ok(response);
            }
            let (head, body) = response.into_parts();
            let _ = Limited::new(body, MOST_OF_AN_ERROR).collect().await;
            Ok(HttpResponse::from_parts(head, Bytes::new().into()))
        })
    }
}
