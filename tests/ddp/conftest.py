from clusters import cluster as cluster
