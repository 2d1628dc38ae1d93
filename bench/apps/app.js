// One small PM2 app: a listening HTTP server that does nothing until it is asked.
'use strict';

require('node:http')
  .createServer((request, response) => response.end('ok\n'))
  .listen(0, '127.0.0.1');
