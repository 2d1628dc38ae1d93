'use strict';
/*
 * WordPecker's backend: lists of words to learn, over HTTP and JSON.
 *   GET  /api/health                 is this process well: status, timestamp, uptime, memory, version
 *   GET  /api/ready                  can it serve: 200, or 503 where MongoDB is configured and does not answer
 *   GET  /api/lists                  all lists             POST /api/lists {name}
 *   GET  /api/lists/ID               one list              DELETE /api/lists/ID
 *   POST /api/lists/ID/words {word, meaning}               add a word, or change its meaning
 *   GET  /api/lists/ID/next          the word to ask next  POST /api/lists/ID/answers {word, correct}
 *   POST /drill/NAME                 misbehave: see drills.js
 * Environment: HOST, PORT, MONGODB_URI, OPENAI_API_KEY, ELEVENLABS_API_KEY, PEXELS_API_KEY (each of the last four also as NAME_FILE,
 * a file that holds the value), WORDPECKER_DRILL.
 */
const cluster = require('node:cluster');
const fs = require('node:fs');
const http = require('node:http');
const { setTimeout: sleep } = require('node:timers/promises');
const { version } = require('../package.json');
const { openStore, StoreDown, StoreFull } = require('./store');
const { Drills, BadParameter } = require('./drills');

const BODY_LIMIT = 16 * 1024;
const TEXT_LIMIT = 200;
const GRACE_MS = 3000; // less than PM2's kill_timeout, so that PM2 never has to kill

/** An answer other than 2xx, for the caller to see. */
class Refused extends Error {
  constructor(status, message, headers = {}) {
    super(message);
    this.status = status;
    this.headers = headers;
  }
}

/** The value of `name`, or of the file that `name`_FILE names: PM2 stores the environment of every app in a readable file. */
function secret(name) {
  const file = process.env[`${name}_FILE`];
  return file ? fs.readFileSync(file, 'utf8').trim() : process.env[name];
}

const keys = Object.fromEntries(
  ['OPENAI_API_KEY', 'ELEVENLABS_API_KEY', 'PEXELS_API_KEY'].map((name) => [name.replace('_API_KEY', '').toLowerCase(), Boolean(secret(name))]),
);
const store = openStore(secret('MONGODB_URI'));
const drills = process.env.WORDPECKER_DRILL === '1' ? new Drills() : undefined;
let stopping = false;

function health() {
  const unhealthy = Boolean(drills?.unhealthy);
  return {
    status: unhealthy ? 503 : 200,
    body: {
      status: unhealthy ? 'unhealthy' : 'healthy',
      timestamp: new Date().toISOString(),
      uptime: process.uptime(),
      memory: process.memoryUsage(),
      version,
    },
  };
}

async function ready() {
  const mongodb = await store.status();
  const able = !stopping && (mongodb.connected || !mongodb.configured);
  return {
    status: able ? 200 : 503,
    body: {
      status: able ? 'ready' : stopping ? 'stopping' : 'not ready',
      timestamp: new Date().toISOString(),
      checks: { mongodb, api_keys: keys },
    },
  };
}

async function readJson(request) {
  // A page of another origin cannot send this type without asking first, and nothing here says yes.
  if (!/^application\/json\b/i.test(request.headers['content-type'] ?? '')) throw new Refused(415, 'the body must be application/json');
  const parts = [];
  let size = 0;
  for await (const part of request) {
    size += part.length;
    if (size > BODY_LIMIT) throw new Refused(413, `the body may have ${BODY_LIMIT} bytes`, { Connection: 'close' });
    parts.push(part);
  }
  try {
    const body = JSON.parse(Buffer.concat(parts).toString('utf8'));
    if (body !== null && typeof body === 'object') return body;
  } catch {
    // told below
  }
  throw new Refused(400, 'the body must be a JSON object');
}

function text(body, name) {
  const value = typeof body[name] === 'string' ? body[name].trim() : '';
  if (value === '' || value.length > TEXT_LIMIT) throw new Refused(400, `${name} must be a text of 1 to ${TEXT_LIMIT} characters`);
  return value;
}

const found = (value) => {
  if (!value) throw new Refused(404, 'no such list or word');
  return value;
};

const ok = (body) => ({ status: 200, body });
const made = (body) => ({ status: 201, body });
const LIST = '/api/lists/([0-9a-f-]{36})';

const routes = [
  ['GET', '/api/health', () => health()],
  ['GET', '/api/ready', () => ready()],
  ['GET', '/api/lists', async () => ok(await store.lists())],
  ['POST', '/api/lists', async ({ request }) => made(await store.add(text(await readJson(request), 'name')))],
  ['GET', LIST, async ({ id }) => ok(found(await store.list(id)))],
  ['DELETE', LIST, async ({ id }) => ({ status: 204, body: found(await store.remove(id)) && undefined })],
  ['POST', `${LIST}/words`, async ({ request, id }) => {
    const body = await readJson(request);
    return made(found(await store.addWord(id, text(body, 'word'), text(body, 'meaning'))));
  }],
  ['GET', `${LIST}/next`, async ({ id }) => {
    const { words } = found(await store.list(id));
    return ok(found(words.reduce((least, word) => (least && least.box <= word.box ? least : word), undefined)));
  }],
  ['POST', `${LIST}/answers`, async ({ request, id }) => {
    const body = await readJson(request);
    if (typeof body.correct !== 'boolean') throw new Refused(400, 'correct must be true or false');
    return ok(found(await store.answer(id, text(body, 'word'), body.correct)));
  }],
];
if (drills) {
  routes.push(['GET', '/drill', () => ok({ drills: drills.names })]);
  routes.push(['POST', '/drill/([a-z-]+)', ({ request, id: name, query }) => {
    if (request.headers.origin) throw new Refused(403, 'no web page may start a drill');
    const drill = drills.prepare(name, query);
    if (!drill) throw new Refused(404, `no such drill; there are: ${drills.names.join(', ')}`);
    console.log(`drill: ${JSON.stringify(drill.told)}`);
    return { status: 202, body: drill.told, after: drill.after };
  }]);
}
const table = routes.map(([method, path, answer]) => ({ method, path: new RegExp(`^${path}$`), answer }));

async function answerTo(request) {
  const [path, search = ''] = request.url.split('?', 2);
  const here = table.map((route) => ({ ...route, match: route.path.exec(path) })).filter(({ match }) => match);
  if (here.length === 0) throw new Refused(404, 'no such page');
  if (drills?.latencyMs && path.startsWith('/api/')) await sleep(drills.latencyMs);
  const method = request.method === 'HEAD' ? 'GET' : request.method;
  const route = here.find((each) => each.method === method);
  if (!route) throw new Refused(405, 'no such method here', { Allow: [...new Set(here.map((each) => each.method))].join(', ') });
  return route.answer({ request, id: route.match[1], query: new URLSearchParams(search) });
}

function refusalOf(error) {
  if (error instanceof Refused) return { status: error.status, headers: error.headers, body: { error: error.message } };
  if (error instanceof BadParameter) return { status: 400, body: { error: error.message } };
  if (error instanceof StoreDown) return { status: 503, body: { error: error.message } };
  if (error instanceof StoreFull) return { status: 409, body: { error: error.message } };
  console.error(error);
  return { status: 500, body: { error: 'a fault of the server' } };
}

const server = http.createServer(async (request, response) => {
  const { status, body, headers = {}, after } = await Promise.resolve(answerTo(request)).catch(refusalOf);
  if (response.destroyed) return;
  const content = body === undefined ? '' : `${JSON.stringify(body)}\n`;
  response.writeHead(status, {
    ...(content && { 'Content-Type': 'application/json; charset=utf-8' }),
    ...(status !== 204 && { 'Content-Length': Buffer.byteLength(content) }),
    'Cache-Control': 'no-store',
    'X-Content-Type-Options': 'nosniff',
    ...(stopping && { Connection: 'close' }),
    ...headers,
  });
  if (after) response.once('finish', () => setImmediate(after)); // outside this promise, so that a thrown error is uncaught
  response.end(request.method === 'HEAD' ? '' : content);
});
server.headersTimeout = 10_000;
server.requestTimeout = 15_000;
server.keepAliveTimeout = 5_000;

function shutDown(signal) {
  if (stopping) return;
  stopping = true;
  console.log(`${signal}: finishing the requests in hand`);
  const leave = async () => {
    await Promise.race([store.close().catch(() => undefined), sleep(500)]);
    setTimeout(() => process.exit(0), 500);
    if (!cluster.isWorker || !process.connected) process.exit(0);
    // The daemon may have handed us a connection that is still on its way. Disconnecting hands it back and waits for the daemon's
    // word that no more will come; to exit here would leave that client without an answer.
    process.once('disconnect', () => process.exit(0));
    cluster.worker.disconnect();
  };
  setTimeout(leave, GRACE_MS).unref();
  server.close(leave);
  server.closeIdleConnections();
}
process.on('SIGINT', shutDown);
process.on('SIGTERM', shutDown);

server.listen(Number(process.env.PORT || 3000), process.env.HOST || '127.0.0.1', () => {
  const { address, port } = server.address();
  console.log(`wordpecker backend ${version} listens on http://${address}:${port}${drills ? ', drills allowed' : ''}`);
  process.send?.('ready'); // PM2 waits for it (wait_ready)
});

if (drills && process.env.WORDPECKER_DRILL_CRASH_AFTER_MS) {
  setTimeout(() => { throw new Error('drill: crash after start'); }, Number(process.env.WORDPECKER_DRILL_CRASH_AFTER_MS));
}
